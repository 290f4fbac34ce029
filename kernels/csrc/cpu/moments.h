// Mean and standard deviation over a token's channels, for LayerNorm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace spatial_mamba {

constexpr int kLockstep = 4;  // vectors of channels

// Calls visit(n, channel, lanes) for all vectors of channels: n full vectors at a time, then single ones.
template <typename T, typename Visit>
inline __attribute__((always_inline)) void for_channels(int64_t dim, Visit&& visit) {
  constexpr int lanes = kLanes<T>;
  int64_t channel = 0;
  for (; channel + kLockstep * lanes <= dim; channel += kLockstep * lanes) {
    visit(std::integral_constant<int, kLockstep>{}, channel, lanes);
  }
  for (; channel < dim; channel += lanes) {
    visit(std::integral_constant<int, 1>{}, channel, static_cast<int>(std::min<int64_t>(lanes, dim - channel)));
  }
}

// Sets lanes beyond the last channel to zero again, as loads leave them.
template <typename T>
inline Vec<T> masked(Vec<T> x, int lanes) {
  for (int lane = lanes; lane < kLanes<T>; ++lane) x[lane] = T(0);
  return x;
}

template <typename T>
struct Moments {
  T mean, rstd;
};

template <typename T, typename yio>
Moments<T> moments(const yio* y, int64_t dim, T eps) {
  Vec<T> total[kLockstep] = {}, squares[kLockstep] = {};
  for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
    each<n>([&](int k) { total[k] += load(y + channel + k * kLanes<T>, lanes); });
  });
  const T mean = sum<T>((total[0] + total[1]) + (total[2] + total[3])) / dim;
  for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
    each<n>([&](int k) {
      Vec<T> rest = load(y + channel + k * kLanes<T>, lanes) - mean;
      if (lanes < kLanes<T>) rest = masked<T>(rest, lanes);
      squares[k] += rest * rest;
    });
  });
  const T variance = sum<T>((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim;
  return {mean, T(1) / std::sqrt(variance + eps)};
}

// Calls visit(token, moments) for all tokens, whose channels are row(token). The moments of several tokens are computed
// one after the other, so that their long chains of operations overlap.
template <typename T, typename Row, typename Visit>
void for_moments(int64_t first, int64_t last, int64_t dim, T eps, Row&& row, Visit&& visit) {
  constexpr int64_t kTogether = 8;
  Moments<T> found[kTogether];
  for (; first < last; first += kTogether) {
    const int64_t count = std::min(kTogether, last - first);
    for (int64_t k = 0; k < count; ++k) found[k] = moments<T>(row(first + k), dim, eps);
    for (int64_t k = 0; k < count; ++k) visit(first + k, found[k]);
  }
}

}  // namespace spatial_mamba
