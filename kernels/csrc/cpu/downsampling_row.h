// A row of ReLU, depthwise 3x3 convolution of stride 2 with bias, ReLU.
#pragma once

#include "convolution.h"

namespace spatial_mamba {

template <typename T>
inline Vec<T> relu(const Vec<T>& x) {
  return at_least(T(0), x);  // keeps NaN, as PyTorch does
}

inline Shape halved(const Shape& shape) {
  return {shape.batch, (shape.height + 1) / 2, (shape.width + 1) / 2, shape.dim};
}

// The 3x3 inputs of an output token, rectified, and the convolution of them.
template <typename io>
struct Window {
  using T = Compute<io>;

  Window(const Neighbours<io, 1>& around, int64_t channel, int lanes, const Vec<T>* taps) : sum(taps[kTaps]) {
    const auto inputs = around.at(channel, lanes);
    each<kTaps>([&](int k) {
      near[k] = relu<T>(inputs(k / 3, k % 3));
      sum += taps[k] * near[k];
    });
  }

  Vec<T> near[kTaps], sum;
};

// The inputs of output token (i, j); row(k) is input row k.
template <typename io, typename Row>
Neighbours<io, 1> inputs_of(const Shape& shape, Row&& row, int64_t i, int64_t j, const io* zeros) {
  return {shape, 2 * i, 2 * j, zeros, [&](int64_t k, int64_t column) { return row(k) + column * shape.dim; }};
}

// Row i of the outputs.
template <typename io, typename Row>
void downsample_row(const Shape& shape, Row&& row, int64_t i, const Weights<Compute<io>>& weights, const io* zeros,
                    io* out) {
  using T = Compute<io>;
  for (int64_t j = 0; j < halved(shape).width; ++j) {
    const auto around = inputs_of<io>(shape, row, i, j, zeros);
    for (int64_t chunk = 0; chunk < shape.chunks<T>(); ++chunk) {
      const int64_t channel = chunk * kLanes<T>;
      const int lanes = shape.lanes<T>(channel);
      store(out + j * shape.dim + channel, relu<T>(Window<io>(around, channel, lanes, weights[chunk]).sum), lanes);
    }
  }
}

}  // namespace spatial_mamba
