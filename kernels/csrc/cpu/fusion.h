// Fusion of a row of states with the rows around it, its adjoint and the gradients of its taps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace spatial_mamba {

// The neighbours that fusion reads, and their largest distance.
struct Neighbourhood {
  struct Offset {
    int64_t row, column;
  };

  Neighbourhood(const int64_t* flat, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      offsets.push_back({flat[2 * t], flat[2 * t + 1]});
      row_reach = std::max(row_reach, std::abs(offsets[t].row));
      column_reach = std::max(column_reach, std::abs(offsets[t].column));
    }
  }
  int64_t size() const { return static_cast<int64_t>(offsets.size()); }
  int64_t rows() const { return 2 * row_reach + 1; }

  std::vector<Offset> offsets;
  int64_t row_reach = 0, column_reach = 0;
};

// The last few rows of a map, one vector of channels per token. Each row has a margin on both sides: zeros, or copies
// of its first and last token.
template <typename T>
class RowRing {
 public:
  RowRing(int64_t rows, int64_t width, int64_t margin)
      : rows_(rows), width_(width), margin_(margin), stride_(width + 2 * margin), tokens_(rows * stride_) {
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(row(i) - margin_, margin_, Vec<T>{});
      std::fill_n(row(i) + width_, margin_, Vec<T>{});
    }
  }

  Vec<T>* row(int64_t i) {
    const uint32_t place = static_cast<uint32_t>(i) % static_cast<uint32_t>(rows_);  // faster than in 64 bits
    return tokens_.data() + place * stride_ + margin_;
  }

  // Fills the margins of row i with its first and last token: replicate padding.
  void repeat_edges(int64_t i) {
    Vec<T>* tokens = row(i);
    std::fill_n(tokens - margin_, margin_, tokens[0]);
    std::fill_n(tokens + width_, margin_, tokens[width_ - 1]);
  }

 private:
  int64_t rows_, width_, margin_, stride_;
  Vectors<T> tokens_;
};

// A neighbour of every token of a row: tokens[j] is the neighbour of token j, t the index of its tap.
template <typename T>
struct Tap {
  const Vec<T>* tokens;
  int64_t t;
};

// The taps of row i of a map; rows outside the map repeat its first and last row.
template <typename T>
inline void find_taps(const Neighbourhood& around, RowRing<T>& states, int64_t i, int64_t height,
                      std::vector<Tap<T>>& taps) {
  taps.resize(around.size());
  const Vec<T>* tokens = nullptr;
  int64_t tokens_row = -1;
  for (int64_t t = 0; t < around.size(); ++t) {
    const auto [row, column] = around.offsets[t];
    const int64_t neighbour = std::clamp<int64_t>(i + row, 0, height - 1);
    if (neighbour != tokens_row) tokens = states.row(tokens_row = neighbour);  // offsets are sorted by row
    taps[t] = {tokens + column, t};
  }
}

// The taps whose weighted sum is the adjoint of fusion: the rows that read row i, each with the tap that reads it.
template <typename T>
inline void find_adjoint_taps(const Neighbourhood& around, RowRing<T>& grads, int64_t i, int64_t height,
                              std::vector<Tap<T>>& taps) {
  taps.clear();
  const Vec<T>* tokens = nullptr;
  int64_t tokens_row = -1;
  for (int64_t t = 0; t < around.size(); ++t) {
    const auto [row, column] = around.offsets[t];
    const int64_t first = i == 0 ? 0 : std::max<int64_t>(i - row, 0);
    const int64_t last = i == height - 1 ? height - 1 : std::min(i - row, height - 1);
    for (int64_t reader = first; reader <= last; ++reader) {
      if (reader != tokens_row) tokens = grads.row(tokens_row = reader);
      taps.push_back({tokens - column, t});
    }
  }
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

// fused[k] = sum over taps of weight * neighbour, for the n tokens from j on.
template <int n, typename T>
inline void fuse(const std::vector<Tap<T>>& taps, const Vectors<T>& weights, int64_t j, Vec<T> (&fused)[n]) {
  Vec<T> sums[n] = {};
  for (const auto& tap : taps) {
    const Vec<T> weight = weights[tap.t];
    const Vec<T>* tokens = tap.tokens + j;
    each<n>([&](int k) { sums[k] += weight * tokens[k]; });
  }
  each<n>([&](int k) { fused[k] = sums[k]; });
}

// Like fuse, and adds grad[k] * neighbour to the gradients of the taps.
template <int n, typename T>
inline void fuse_and_correlate(const std::vector<Tap<T>>& taps, const Vectors<T>& weights, int64_t j,
                               const Vec<T> (&grad)[n], Vec<T> (&fused)[n], Vectors<T>& grad_weights) {
  Vec<T> sums[n] = {};
  for (const auto& tap : taps) {
    const Vec<T> weight = weights[tap.t];
    const Vec<T>* tokens = tap.tokens + j;
    Vec<T> correlation = {};
    each<n>([&](int k) {
      sums[k] += weight * tokens[k];
      correlation += grad[k] * tokens[k];
    });
    grad_weights[tap.t] += correlation;
  }
  each<n>([&](int k) { fused[k] = sums[k]; });
}

// The adjoint of fusion for one row: the sum over the tokens that read each token. Their gradients are in rows with
// margins of zeros. The first and last token are also read in place of neighbours outside the map.
template <typename T>
inline void fuse_adjoint(const Neighbourhood& around, const std::vector<Tap<T>>& adjoint_taps,
                         const Vectors<T>& weights, int64_t width, Vec<T>* received) {
  for_token_blocks(width, [&](auto n, int64_t j) {
    Vec<T> sums[n];
    fuse(adjoint_taps, weights, j, sums);
    each<n>([&](int k) { received[j + k] = sums[k]; });
  });
  for (const auto& tap : adjoint_taps) {
    const int64_t column = around.offsets[tap.t].column;
    const Vec<T>* readers = tap.tokens + column;
    Vec<T> beyond = {};
    if (column < 0) {
      for (int64_t j = 0; j < std::min(-column, width); ++j) beyond += readers[j];
      received[0] += weights[tap.t] * beyond;
    } else {
      for (int64_t j = std::max<int64_t>(width - column, 0); j < width; ++j) beyond += readers[j];
      received[width - 1] += weights[tap.t] * beyond;
    }
  }
}

}  // namespace spatial_mamba
