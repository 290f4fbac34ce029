// Fusion of the states of one row with those of its neighbours, and the adjoint, on rows held in fast memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "vec.h"

namespace spatial_mamba {

struct Offset {
  int64_t row, column;
};

// The neighbours that fusion reads, and how far away the farthest of them are.
struct Neighbourhood {
  explicit Neighbourhood(const std::vector<int64_t>& flat) {
    for (size_t i = 0; i + 1 < flat.size(); i += 2) {
      offsets.push_back({flat[i], flat[i + 1]});
      row_reach = std::max(row_reach, std::abs(flat[i]));
      column_reach = std::max(column_reach, std::abs(flat[i + 1]));
    }
  }
  int64_t size() const { return static_cast<int64_t>(offsets.size()); }

  std::vector<Offset> offsets;
  int64_t row_reach = 0, column_reach = 0;
};

// The last rows of a map, one vector of channels per token, with room for the neighbours of the first and last tokens.
template <typename T>
class RowRing {
 public:
  RowRing(int64_t rows, int64_t width, int64_t margin)
      : rows_(rows), width_(width), margin_(margin), stride_(width + 2 * margin), data_(rows * stride_) {}

  Vec<T>* row(int64_t i) { return data_.data() + i % rows_ * stride_ + margin_; }

  void repeat_edges(int64_t i) {
    Vec<T>* tokens = row(i);
    std::fill(tokens - margin_, tokens, tokens[0]);
    std::fill(tokens + width_, tokens + width_ + margin_, tokens[width_ - 1]);
  }

  void clear() { std::fill(data_.data(), data_.data() + rows_ * stride_, Vec<T>{}); }

 private:
  int64_t rows_, width_, margin_, stride_;
  Scratch<T> data_;
};

// A neighbour's row, shifted so that index j is the neighbour of token j, and the weight of the neighbour.
template <typename T>
struct Tap {
  const Vec<T>* tokens;
  int64_t index;
};

// Calls step<n>(j) for blocks of n tokens that cover a row. With 14, accumulators and weight fill the registers of
// AVX2 and the widths of 224 pixel images are multiples; the last block overlaps its predecessor.
template <typename Step>
inline void for_token_blocks(int64_t width, Step&& step) {
  constexpr int64_t kLarge = 14, kSmall = 7;
  if (width >= kLarge) {
    for (int64_t j = 0; j < width; j += kLarge) {
      step(std::integral_constant<int, kLarge>(), std::min(j, width - kLarge));
    }
  } else if (width >= kSmall) {
    for (int64_t j = 0; j < width; j += kSmall) {
      step(std::integral_constant<int, kSmall>(), std::min(j, width - kSmall));
    }
  } else {
    for (int64_t j = 0; j < width; ++j) step(std::integral_constant<int, 1>(), j);
  }
}

// The taps of row i of a map of the given height: neighbours beyond the first and last row repeat them.
template <typename T>
inline void taps_of_row(const Neighbourhood& neighbourhood, RowRing<T>& states, int64_t i, int64_t height,
                        std::vector<Tap<T>>& taps) {
  taps.clear();
  for (int64_t t = 0; t < neighbourhood.size(); ++t) {
    const auto [row, column] = neighbourhood.offsets[t];
    taps.push_back({states.row(std::clamp(i + row, int64_t(0), height - 1)) + column, t});
  }
}

// sum over taps of weight * neighbour, for n tokens from j on.
template <int n, typename T>
inline void fuse_tokens(const std::vector<Tap<T>>& taps, const Vec<T>* weights, int64_t j, Vec<T>* fused) {
  Vec<T> sums[n] = {};
  for (const auto& tap : taps) {
    const Vec<T> weight = weights[tap.index];
    const Vec<T>* tokens = tap.tokens + j;
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) sums[k] += weight * tokens[k];
  }
  for (int k = 0; k < n; ++k) fused[k] = sums[k];
}

}  // namespace spatial_mamba
