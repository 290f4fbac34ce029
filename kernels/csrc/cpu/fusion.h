// Fusion of a row of states with the rows around it, its adjoint and the gradients of its taps.
#pragma once

#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace spatial_mamba {

// The neighbours that fusion reads, and their largest distance. All neighbours beyond the map are copies of its edge, so
// no distance needs to be larger than the map.
struct Neighbourhood {
  struct Offset {
    int64_t row, column;
  };

  Neighbourhood(at::IntArrayRef flat, int64_t height, int64_t width) {
    for (size_t i = 0; i < flat.size(); i += 2) {
      const auto row = std::clamp<int64_t>(flat[i], 1 - height, height - 1);
      const auto column = std::clamp<int64_t>(flat[i + 1], 1 - width, width - 1);
      offsets.push_back({row, column});
      row_reach = std::max(row_reach, std::abs(row));
      column_reach = std::max(column_reach, std::abs(column));
    }
  }
  int64_t size() const { return static_cast<int64_t>(offsets.size()); }
  int64_t rows() const { return 2 * row_reach + 1; }

  std::vector<Offset> offsets;
  int64_t row_reach = 0, column_reach = 0;
};

// Where the rows of a map are in a ring that holds the last few of them, each with a margin on both sides.
struct RingLayout {
  int64_t rows, width, margin;

  int64_t stride() const { return width + 2 * margin; }
  int64_t start(int64_t i) const { return i % rows * stride() + margin; }  // the first token of row i
};

// The last few rows of a map, one vector of channels per token. Margins hold zeros, or copies of the nearest token.
template <typename T>
class RowRing {
 public:
  explicit RowRing(const RingLayout& layout) : layout_(layout), tokens_(layout.rows * layout.stride()) {
    for (int64_t i = 0; i < layout.rows; ++i) {
      std::fill_n(row(i) - layout.margin, layout.margin, Vec<T>{});
      std::fill_n(row(i) + layout.width, layout.margin, Vec<T>{});
    }
  }

  Vec<T>* row(int64_t i) { return tokens_.data() + layout_.start(i); }
  const Vec<T>* data() const { return tokens_.data(); }

  // Fills the margins of row i with its first and last token: replicate padding.
  void repeat_edges(int64_t i) {
    Vec<T>* tokens = row(i);
    std::fill_n(tokens - layout_.margin, layout_.margin, tokens[0]);
    std::fill_n(tokens + layout_.width, layout_.margin, tokens[layout_.width - 1]);
  }

 private:
  RingLayout layout_;
  Vectors<T> tokens_;
};

// A neighbour of every token of a row: the place in a ring of that of the first token, and the index of its tap.
struct Tap {
  int64_t start, t;
};
using Taps = std::vector<Tap>;

// The taps of each row of a map; rows outside the map repeat its first and last row.
inline std::vector<Taps> find_taps(const Neighbourhood& around, const RingLayout& ring, int64_t height) {
  std::vector<Taps> taps(height);
  for (int64_t i = 0; i < height; ++i) {
    taps[i].reserve(around.size());
    for (int64_t t = 0; t < around.size(); ++t) {
      const auto [row, column] = around.offsets[t];
      const int64_t neighbour = std::clamp<int64_t>(i + row, 0, height - 1);
      taps[i].push_back({ring.start(neighbour) + column, t});
    }
  }
  return taps;
}

// The taps whose weighted sum is the adjoint of fusion: the rows that read each row, with the taps that read it.
inline std::vector<Taps> find_adjoint_taps(const Neighbourhood& around, const RingLayout& ring, int64_t height) {
  std::vector<Taps> taps(height);
  for (int64_t t = 0; t < around.size(); ++t) {
    const auto [row, column] = around.offsets[t];
    for (int64_t reader = 0; reader < height; ++reader) {
      const int64_t read = std::clamp<int64_t>(reader + row, 0, height - 1);
      taps[read].push_back({ring.start(reader) - column, t});
    }
  }
  return taps;
}

// Calls step(n, j) for blocks of n tokens that cover a row; the last block overlaps the one before. 14 accumulators and
// a weight fill the registers of AVX2, and the map widths of 224-pixel images are multiples of 14 or 7.
template <typename Step>
inline void for_token_blocks(int64_t width, Step&& step) {
  const auto cover = [&](auto n) {
    for (int64_t j = 0; j < width; j += n) step(n, std::min<int64_t>(j, width - n));
  };
  if (width >= 14) {
    cover(std::integral_constant<int, 14>());
  } else if (width >= 7) {
    cover(std::integral_constant<int, 7>());
  } else {
    cover(std::integral_constant<int, 1>());
  }
}

// fused[k] = sum over taps of weight * neighbour, for the n tokens from j on. `ring` holds the neighbours.
template <int n, typename T>
inline void fuse(const Vec<T>* ring, const Taps& taps, const Vectors<T>& weights, int64_t j,
                 Vec<T> (&fused)[n]) {
  Vec<T> sums[n] = {};
  for (const auto& tap : taps) {
    const Vec<T> weight = weights[tap.t];
    const Vec<T>* tokens = ring + tap.start + j;
    each<n>([&](int k) { sums[k] += weight * tokens[k]; });
  }
  each<n>([&](int k) { fused[k] = sums[k]; });
}

// Like fuse, and adds grad[k] * neighbour to the gradients of the taps.
template <int n, typename T>
inline void fuse_and_correlate(const Vec<T>* ring, const Taps& taps, const Vectors<T>& weights, int64_t j,
                               const Vec<T> (&grad)[n], Vec<T> (&fused)[n], Vectors<T>& grad_weights) {
  Vec<T> sums[n] = {};
  for (const auto& tap : taps) {
    const Vec<T> weight = weights[tap.t];
    const Vec<T>* tokens = ring + tap.start + j;
    Vec<T> correlation = {};
    each<n>([&](int k) {
      sums[k] += weight * tokens[k];
      correlation += grad[k] * tokens[k];
    });
    grad_weights[tap.t] += correlation;
  }
  each<n>([&](int k) { fused[k] = sums[k]; });
}

// The adjoint of fusion for one row: the sum over the tokens that read each token. Their gradients are in a ring with
// margins of zeros. The first and last token are also read in place of neighbours outside the map.
template <typename T>
inline void fuse_adjoint(const Neighbourhood& around, const Vec<T>* ring, const Taps& adjoint_taps,
                         const Vectors<T>& weights, int64_t width, Vec<T>* received) {
  for_token_blocks(width, [&](auto n, int64_t j) {
    Vec<T> sums[n];
    fuse(ring, adjoint_taps, weights, j, sums);
    each<n>([&](int k) { received[j + k] = sums[k]; });
  });
  Vec<T> left = {}, right = {};
  for (const auto& tap : adjoint_taps) {
    const int64_t column = around.offsets[tap.t].column;
    const Vec<T>* readers = ring + tap.start + column;
    Vec<T> beyond = {};
    if (column < 0) {
      for (int64_t j = 0; j < -column; ++j) beyond += readers[j];
      left += weights[tap.t] * beyond;
    } else {
      for (int64_t j = width - column; j < width; ++j) beyond += readers[j];
      right += weights[tap.t] * beyond;
    }
  }
  received[0] += left;
  received[width - 1] += right;
}

}  // namespace spatial_mamba
