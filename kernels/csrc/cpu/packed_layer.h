// A linear layer with packed weights, applied to a tile of tokens on one thread.
#pragma once

#include <ATen/Dispatch.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "matrix_tiles.h"
#include "moments.h"
#include "packing.h"

// Dispatches over the dtypes of packed weights.
#define DISPATCH_PACKED(dtype, name, ...)                                                               \
  AT_DISPATCH_SWITCH(dtype, name,                                                                       \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

namespace spatial_mamba {

// Prepares the matrix units of this thread, and releases them at the end of the scope.
struct MatrixUnits {
  MatrixUnits() {
    if (has_matrix_tiles()) configure_tiles();
  }
  ~MatrixUnits() {
    release_microkernels();
    if (has_matrix_tiles()) release_tiles();
  }
};

template <typename io>
struct Layer {
  Layer(const at::Tensor& packed, int64_t outputs, const std::optional<at::Tensor>& bias)
      : weight(packed.const_data_ptr<io>()),
        bias(bias ? bias->const_data_ptr<io>() : nullptr),
        inputs(packed.size(1)),
        outputs(outputs) {}

  const io *weight, *bias;
  int64_t inputs, outputs;
};

// Scratch memory of `apply` for a tile of tokens.
inline Vectors<float> scratch_for(int64_t tokens) {
  return Vectors<float>(std::max(tokens, 2 * kTileRows) * kColumns / kLanes<float>);
}

// Whether matrix units multiply a tile of tokens, in blocks of kTileRows.
template <typename io>
bool use_matrix_tiles(const Layer<io>& layer, int64_t tokens) {
  return std::is_same_v<io, c10::BFloat16> && has_matrix_tiles() && layer.inputs % kTileInputs == 0 &&
         tokens >= kTileRows;
}

struct Nothing {
  template <typename... Arguments>
  void operator()(Arguments&&...) const {}
};

// Sums of products for a block of tokens and 64 outputs, in scratch memory.
struct Sums {
  float* data;
  int64_t start;         // the first token in `data`
  int64_t begin, count;  // the tokens to finish; begin > start if the block overlaps the one before
  int64_t first;         // the first output
};

// out (tokens, outputs) = finish(x (tokens, inputs) times the weights + bias), with scratch memory.
template <typename io, typename Finish>
void apply(const Layer<io>& layer, const io* x, int64_t tokens, float* scratch, io* out, const Finish& finish) {
  const auto finish_token = [&](const Sums& sums, int64_t token) __attribute__((always_inline)) {
    const float* row = sums.data + (token - sums.start) * kColumns;
    io* to = out + token * layer.outputs + sums.first;
    for_channels<float>(std::min(kColumns, layer.outputs - sums.first), [&](auto n, int64_t channel, int lanes) {
      Vec<float> y[n];
      each<n>([&](int k) {
        y[k] = load(row + channel + k * kLanes<float>, lanes);
        if (layer.bias) y[k] += load(layer.bias + sums.first + channel + k * kLanes<float>, lanes);
      });
      finish(n, y, token * layer.outputs + sums.first + channel, lanes);
      each<n>([&](int k) { store(to + channel + k * kLanes<float>, y[k], lanes); });
    });
  };
  const auto finish_all = [&](const Sums& sums) {
    for (int64_t token = sums.begin; token < sums.begin + sums.count; ++token) finish_token(sums, token);
  };

  if constexpr (std::is_same_v<io, c10::BFloat16>) {
    if (use_matrix_tiles(layer, tokens)) {
      const int64_t steps = layer.inputs / kTileInputs * 2, per_step = at::divup(kTileRows, steps);
      Sums last = {}, next = {scratch};
      float* spare = scratch + kTileRows * kColumns;
      for (next.first = 0; next.first < layer.outputs; next.first += kColumns) {
        for_tiles(tokens, kTileRows, [&](int64_t begin, int64_t count) {
          // All blocks have the same number of rows, so the last one may overlap the one before.
          next.start = std::min(begin, tokens - kTileRows);
          next.begin = begin;
          next.count = count;
          const io* block = layer.weight + next.first * layer.inputs;
          multiply_tiles(x + next.start * layer.inputs, layer.inputs, block, next.data, [&](int64_t step) {
            const int64_t end = std::min((step + 1) * per_step, last.count);
            for (int64_t k = step * per_step; k < end; ++k) finish_token(last, last.begin + k);
          });
          last = next;
          std::swap(next.data, spare);
        });
      }
      return finish_all(last);
    }
  }
  for (int64_t first = 0; first < layer.outputs; first += kColumns) {
    const io* block = layer.weight + first * layer.inputs;
    if constexpr (std::is_same_v<io, float> && std::is_same_v<Finish, Nothing>) {
      if (layer.outputs - first >= kColumns && !layer.bias) {
        multiply_packed(x, tokens, layer.inputs, block, kColumns, out + first, layer.outputs);
        continue;
      }
    }
    multiply_packed(x, tokens, layer.inputs, block, kColumns, scratch, kColumns);
    finish_all({scratch, 0, 0, tokens, first});
  }
  if (std::is_same_v<io, c10::BFloat16> && has_matrix_tiles()) {  // which the microkernels have reconfigured
    release_microkernels();
    configure_tiles();
  }
}

inline constexpr auto kRelu = [](auto n, auto& y, int64_t, int) {
  each<n>([&](int k) { y[k] = at_least(0.0f, y[k]); });
};

template <typename io>
auto adding(const io* residual) {
  return [residual](auto n, auto& y, int64_t at, int lanes) {
    each<n>([&](int k) { y[k] += load(residual + at + k * kLanes<float>, lanes); });
  };
}

}  // namespace spatial_mamba
