// What the depthwise 3x3 convolutions share: weights by vector of channels, neighbours of tokens, tiles of channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "tokens.h"
#include "vec.h"

namespace spatial_mamba {

constexpr int kTaps = 9;
constexpr int kTokenBlock = 4;  // tokens of a row that are computed together, since their neighbours overlap

enum class Epilogue { kNone, kSilu, kResidual };

// Weights by vector of channels: the nine taps, row by row, and the bias.
template <typename T>
class Weights {
 public:
  Weights(const Shape& shape, const T* weight, const T* bias) : vectors_(shape.chunks<T>() * (kTaps + 1)) {
    for (int64_t chunk = 0; chunk < shape.chunks<T>(); ++chunk) {
      Vec<T>* out = vectors_.data() + chunk * (kTaps + 1);
      std::fill_n(out, kTaps + 1, Vec<T>{});
      for (int lane = 0; lane < shape.lanes<T>(chunk * kLanes<T>); ++lane) {
        const int64_t channel = chunk * kLanes<T> + lane;
        for (int t = 0; t < kTaps; ++t) out[t][lane] = weight[channel * kTaps + t];
        out[kTaps][lane] = bias[channel];
      }
    }
  }
  const Vec<T>* operator[](int64_t chunk) const { return vectors_.data() + chunk * (kTaps + 1); }

 private:
  Vectors<T> vectors_;
};

// The neighbours of n tokens of a row, as pointers to their channels, or to zeros outside the map. With vectors as io,
// for a map in memory of vectors.
template <typename io, int n>
struct Neighbours {
  template <typename At>
  Neighbours(const Shape& shape, int64_t i, int64_t j, const io* zeros, At&& at) {
    for (int row = 0; row < 3; ++row) {
      const bool inside = i + row >= 1 && i + row <= shape.height;
      for (int column = 0; column < n + 2; ++column) {
        const bool here = inside && j + column >= 1 && j + column <= shape.width;
        tokens[row][column] = here ? at(i + row - 1, j + column - 1) : zeros;
      }
    }
  }
  // (row, column) -> the vector of channels of that neighbour.
  auto at(int64_t channel, int lanes) const {
    return [this, channel, lanes](int row, int column) { return load(tokens[row][column] + channel, lanes); };
  }

  const io* tokens[3][n + 2];
};

// sums[j] += tap(row, k) * x(row, j + k). Each neighbour is loaded once and used at once: few registers suffice.
template <typename T, int n, typename Load, typename Tap>
inline __attribute__((always_inline)) void convolve(Load&& x, Tap&& tap, Vec<T> (&sums)[n]) {
#pragma GCC unroll 3
  for (int row = 0; row < 3; ++row) {
    const Vec<T> weights[3] = {tap(row, 0), tap(row, 1), tap(row, 2)};
#pragma GCC unroll 8
    for (int column = 0; column < n + 2; ++column) {
      const Vec<T> value = x(row, column);
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        if (column >= k && column - k < n) sums[column - k] += weights[k] * value;
      }
    }
  }
}

template <typename Visit>
void for_blocks(int64_t width, Visit&& visit) {
  int64_t j = 0;
  for (; j + kTokenBlock <= width; j += kTokenBlock) visit(std::integral_constant<int, kTokenBlock>{}, j);
  for (; j + 2 <= width; j += 2) visit(std::integral_constant<int, 2>{}, j);
  for (; j < width; ++j) visit(std::integral_constant<int, 1>{}, j);
}

// Row i of the convolution of image b.
template <Epilogue epilogue, typename io>
void convolve_row(const Shape& shape, int64_t b, int64_t i, const Tokens<const io>& x,
                  const Weights<Compute<io>>& weights, const io* zeros, io* out) {
  using T = Compute<io>;
  for_blocks(shape.width, [&](auto n, int64_t j) {
    const Neighbours<io, n> around(shape, i, j, zeros,
                                   [&](int64_t row, int64_t column) { return x[shape.token(b, row) + column]; });
    for (int64_t chunk = 0; chunk < shape.chunks<T>(); ++chunk) {
      const int lanes = shape.lanes<T>(chunk * kLanes<T>);
      const Vec<T>* taps = weights[chunk];
      const auto near = around.at(chunk * kLanes<T>, lanes);
      Vec<T> sums[n];
      each<n>([&](int k) { sums[k] = taps[kTaps]; });
      if constexpr (epilogue == Epilogue::kResidual) each<n>([&](int k) { sums[k] += near(1, k + 1); });
      convolve<T, n>(near, [&](int row, int column) { return taps[3 * row + column]; }, sums);
      if constexpr (epilogue == Epilogue::kSilu) {
        Vec<T> gate[n];
        logistic<T, n>(sums, gate);
        each<n>([&](int k) { sums[k] *= gate[k]; });
      }
      each<n>([&](int k) { prefetch(x[shape.token(b, i + 2) + j + k] + chunk * kLanes<T>); });
      io* first = out + j * shape.dim + chunk * kLanes<T>;
      each<n>([&](int k) { store(first + k * shape.dim, sums[k], lanes); });
    }
  });
}

// Calls run(b, first, last) for every image and tile of vectors of channels: large enough to read memory in long runs,
// small enough to keep all threads busy.
template <typename T, typename Run>
void for_channel_tiles(const Shape& shape, Run&& run) {
  const int64_t wanted = at::divup(2 * at::get_num_threads(), std::max<int64_t>(shape.batch, 1));
  const int64_t size = std::clamp<int64_t>(shape.chunks<T>() / std::max<int64_t>(wanted, 1), 1, 8);
  const int64_t tiles = at::divup(shape.chunks<T>(), size);
  for_items(shape.batch * tiles, 1, [&](int64_t item) {
    const int64_t first = item % tiles * size;
    run(item / tiles, first, std::min(first + size, shape.chunks<T>()));
  });
}

// Writes the gradients of `count` vectors of channels, laid out as in Weights, to (dim, 9) and (dim,).
template <typename T>
void write_weight_gradients(const Shape& shape, int64_t first, int64_t count, const Vec<T>* sums, T* grad_weight,
                            T* grad_bias) {
  for (int64_t chunk = first; chunk < first + count; ++chunk, sums += kTaps + 1) {
    for (int lane = 0; lane < shape.lanes<T>(chunk * kLanes<T>); ++lane) {
      const int64_t channel = chunk * kLanes<T> + lane;
      for (int t = 0; t < kTaps; ++t) grad_weight[channel * kTaps + t] = sums[t][lane];
      grad_bias[channel] = sums[kTaps][lane];
    }
  }
}

}  // namespace spatial_mamba
