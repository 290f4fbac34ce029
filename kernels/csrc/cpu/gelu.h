// The exact GELU and its derivative.
#pragma once

#include <cmath>

#include "vec.h"

namespace spatial_mamba {

// The cumulative normal distribution at x, and the density times sqrt(2 pi). In float32 the absolute error is 8e-8
// (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
template <int n>
inline __attribute__((always_inline)) void normal_distribution(const Vec<float> (&x)[n], Vec<float> (&cumulative)[n],
                                                               Vec<float> (&density)[n]) {
  Vec<float> t[n], p[n];
  each<n>([&](int k) { density[k] = x[k] * x[k] * float(-0.5 * M_LOG2E); });
  exp2_nonpositive(density);
  each<n>([&](int k) { t[k] = at_least(-1e30f, negative_magnitude<float>(x[k])); });
  each<n>([&](int k) { t[k] = reciprocal<float>(1.0f - t[k] * float(0.3275911 * M_SQRT1_2)); });
  each<n>([&](int k) { p[k] = t[k] * 0.5307027145f - 0.7265760135f; });
  each<n>([&](int k) { p[k] = p[k] * t[k] + 0.7107068705f; });
  each<n>([&](int k) { p[k] = p[k] * t[k] - 0.142248368f; });
  each<n>([&](int k) { p[k] = p[k] * t[k] + 0.127414796f; });
  each<n>([&](int k) { p[k] *= density[k] * t[k]; });
  each<n>([&](int k) { cumulative[k] = x[k] < 0 ? p[k] : 1.0f - p[k]; });
}

template <int n>
inline void normal_distribution(const Vec<double> (&x)[n], Vec<double> (&cumulative)[n], Vec<double> (&density)[n]) {
  for (int k = 0; k < n; ++k) {
    for (int lane = 0; lane < kLanes<double>; ++lane) {
      cumulative[k][lane] = 0.5 * std::erfc(-M_SQRT1_2 * x[k][lane]);
      density[k][lane] = std::exp(-0.5 * x[k][lane] * x[k][lane]);
    }
  }
}

template <typename T, int n>
inline __attribute__((always_inline)) void gelu(Vec<T> (&x)[n]) {
  Vec<T> cumulative[n], density[n];
  normal_distribution(x, cumulative, density);
  each<n>([&](int k) { x[k] *= cumulative[k]; });
}

// Replaces x by its GELU and writes the derivative.
template <typename T, int n>
inline __attribute__((always_inline)) void gelu(Vec<T> (&x)[n], Vec<T> (&slope)[n]) {
  Vec<T> cumulative[n], density[n];
  normal_distribution(x, cumulative, density);
  constexpr T kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
  each<n>([&](int k) { slope[k] = cumulative[k] + x[k] * density[k] * kDensity; });
  each<n>([&](int k) { x[k] *= cumulative[k]; });
}

}  // namespace spatial_mamba
