// Vectors from the compiler's vector extension (GCC, Clang; any instruction set), and the functions that scans need.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace spatial_mamba {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// Number of vectors for `dim` channels.
template <typename T>
int64_t chunks_of(int64_t dim) {
  return (dim + kLanes<T> - 1) / kLanes<T>;
}

// The type of states and accumulators for tensors of type io: float, or double for double.
template <typename io>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename io>
using Compute = typename ComputeType<io>::type;

// --- load and store; n is less than the number of lanes in the last vector of channels --------------------------------

template <typename T, std::enable_if_t<std::is_floating_point_v<T>, bool> = true>
inline Vec<T> widen(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

// GCC 12 splits the conversion of 16-bit lanes into halves, hence the intrinsics.
inline Vec<float> widen(const c10::BFloat16* p) {
#if defined(__AVX512F__)
  const auto bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const auto bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfBits half;
  std::memcpy(&half, p, sizeof half);
  const auto bits = __builtin_convertvector(half, FloatBits);
#endif
  return (Vec<float>)((FloatBits)bits << 16);
}

inline Vec<float> widen(const c10::Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  Vec<float> x;
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = p[lane];
  return x;
#endif
}

template <typename T, std::enable_if_t<std::is_floating_point_v<T>, bool> = true>
inline void narrow(T* p, const Vec<T>& x) {
  std::memcpy(p, &x, sizeof x);
}

inline void narrow(c10::BFloat16* p, const Vec<float>& x) {
#if defined(__AVX512BF16__)
  const HalfBits bits = (HalfBits)_mm512_cvtneps_pbh((__m512)x);
#else
  const FloatBits wide = (FloatBits)x;
  const FloatBits nearest_even = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const HalfBits bits = __builtin_convertvector(x == x ? nearest_even : FloatBits{} + 0x7fc0u, HalfBits);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

inline void narrow(c10::Half* p, const Vec<float>& x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) p[lane] = x[lane];
#endif
}

template <typename io>
inline Vec<Compute<io>> load(const io* p, int n) {
  constexpr int lanes = kLanes<Compute<io>>;
  if (__builtin_expect(n >= lanes, 1)) return widen(p);
  io padded[lanes] = {};
  std::memcpy(static_cast<void*>(padded), p, n * sizeof(io));
  return widen(padded);
}

template <typename io>
inline void store(io* p, const Vec<Compute<io>>& x, int n) {
  constexpr int lanes = kLanes<Compute<io>>;
  if (__builtin_expect(n >= lanes, 1)) return narrow(p, x);
  io padded[lanes];
  narrow(padded, x);
  std::memcpy(static_cast<void*>(p), padded, n * sizeof(io));
}

// Passes over vectors of channels visit addresses far apart, which defeats hardware prefetching. So they prefetch what
// their next row of tokens reads and writes.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }
inline void prefetch_to_write(const void* address) { __builtin_prefetch(address, 1, 2); }

template <typename T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// The sum of all lanes, by adding halves until one lane is left.
template <typename T, int bytes = kVectorBytes, typename Lanes>
inline T sum_lanes(const Lanes& x) {
  if constexpr (bytes == sizeof(T)) {
    return x[0];
  } else {
    typedef T Half __attribute__((vector_size(bytes / 2)));
    Half low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return sum_lanes<T, bytes / 2>(low + high);
  }
}

template <typename T>
inline T sum(const Vec<T>& x) {
  return sum_lanes<T>(x);
}

// Uninitialised vectors in memory, aligned for vector loads.
template <typename T>
class Vectors {
 public:
  explicit Vectors(int64_t size) : bytes_(new char[size * sizeof(Vec<T>) + kVectorBytes]) {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    data_ = reinterpret_cast<Vec<T>*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }
  Vec<T>* data() { return data_; }
  const Vec<T>* data() const { return data_; }
  T* values() { return reinterpret_cast<T*>(data_); }
  Vec<T>& operator[](int64_t i) { return data_[i]; }
  const Vec<T>& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<char[]> bytes_;
  Vec<T>* data_;
};

// The larger of x and a bound; NaN stays NaN.
template <typename T>
inline Vec<T> at_least(T bound, const Vec<T>& x) {
  // GCC 12 compiles the general form to a comparison and a masked move.
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#endif
  return bound > x ? broadcast(bound) : x;
}

// -|x|
template <typename T>
inline Vec<T> negative_magnitude(const Vec<T>& x) {
  using Word = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint64_t>;
  typedef Word Bits __attribute__((vector_size(kVectorBytes)));
  constexpr int kSign = 8 * sizeof(T) - 1;
  return (Vec<T>)((Bits)x | (Bits{} + 1) << kSign);
}

// --- loops -----------------------------------------------------------------------------------------------------------

template <int n, typename Step>
inline __attribute__((always_inline)) void each(Step&& step) {
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) step(k);
}

// Calls visit(first, count) for consecutive ranges of at most `size` of `total` elements.
template <typename Visit>
void for_tiles(int64_t total, int64_t size, Visit&& visit) {
  for (int64_t first = 0; first < total; first += size) visit(first, std::min(size, total - first));
}

// --- exponentials to base 2, of n vectors in lockstep to hide latency -------------------------------------------------

// x = 2^x for x <= 0, with a relative error of 2e-7; 0 below 2^-126.5, and NaN stays NaN. Exact at 0, because errors of
// decays near 1 accumulate over many tokens.
template <int n>
inline __attribute__((always_inline)) void exp2_nonpositive(Vec<float> (&x)[n]) {
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to an integer, here biased by 127
  constexpr float kSmallest = -127.0f;            // the biased exponent is 0, so the result is 0
  Vec<float> rounded[n], p[n];
  each<n>([&](int k) { x[k] = at_least(kSmallest, x[k]); });
  each<n>([&](int k) { rounded[k] = x[k] + kRound; });
  each<n>([&](int k) { x[k] -= rounded[k] - kRound; });  // the remainder, in [-0.5, 0.5]
  each<n>([&](int k) { p[k] = x[k] * 1.3264727123536587e-3f + 9.6715126448226100e-3f; });
  each<n>([&](int k) { p[k] = p[k] * x[k] + 5.5507337434971390e-2f; });
  each<n>([&](int k) { p[k] = p[k] * x[k] + 2.4022242085262313e-1f; });
  each<n>([&](int k) { p[k] = p[k] * x[k] + 6.9314697759899210e-1f; });
  each<n>([&](int k) { p[k] = p[k] * x[k] + 1.0f; });
  each<n>([&](int k) { x[k] = p[k] * (Vec<float>)((Int)rounded[k] << 23); });
}

// p = log2(1 + e) for e in [0, 1], with a relative error of 3e-7, also for tiny e.
template <int n>
inline __attribute__((always_inline)) void log2_1p(const Vec<float> (&e)[n], Vec<float> (&p)[n]) {
  each<n>([&](int k) { p[k] = e[k] * -1.2319486767681303e-2f + 6.3607945360343070e-2f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] - 1.5535195823464300e-1f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] + 2.5600978900285010e-1f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] - 3.5339485917761380e-1f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] + 4.8006370392869524e-1f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] - 7.2131008899447650e-1f; });
  each<n>([&](int k) { p[k] = p[k] * e[k] + 1.4426947605495795f; });
  each<n>([&](int k) { p[k] *= e[k]; });
}

template <int n>
inline void exp2_nonpositive(Vec<double> (&x)[n]) {
  for (auto& vector : x) {
    for (int lane = 0; lane < kLanes<double>; ++lane) vector[lane] = std::exp2(vector[lane]);
  }
}

// Like exp2_nonpositive, for any x; infinite from 2^127.5 on.
template <int n>
inline void exp2(Vec<float> (&x)[n]) {
  each<n>([&](int k) { x[k] = 128.0f < x[k] ? broadcast(128.0f) : x[k]; });
  exp2_nonpositive(x);
}

template <int n>
inline void exp2(Vec<double> (&x)[n]) {
  exp2_nonpositive(x);
}

template <int n>
inline void log2_1p(const Vec<double> (&e)[n], Vec<double> (&p)[n]) {
  for (int k = 0; k < n; ++k) {
    for (int lane = 0; lane < kLanes<double>; ++lane) p[k][lane] = std::log1p(e[k][lane]) * M_LOG2E;
  }
}

// Softplus to base 2, s = log2(1 + 2^x); e receives 2^-|x|, from which the derivative is computed.
template <typename T, int n>
inline __attribute__((always_inline)) void softplus2(const Vec<T> (&x)[n], Vec<T> (&e)[n], Vec<T> (&s)[n]) {
  each<n>([&](int k) { e[k] = negative_magnitude<T>(x[k]); });
  exp2_nonpositive(e);
  log2_1p(e, s);
  each<n>([&](int k) { s[k] += at_least(T(0), x[k]); });
}

// 1 / x to an ulp, for 1 <= x <= 2^100. Divisions of AVX-512 take as long as about 20 other operations.
template <typename T>
inline Vec<T> reciprocal(const Vec<T>& x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (1.0f - x * estimate);  // Newton's method
  }
#endif
  return T(1) / x;
}

// The derivative of the softplus, the logistic function, from x and e = exp(-|x|).
template <typename T>
inline Vec<T> logistic(const Vec<T>& x, const Vec<T>& e) {
  return (x < 0 ? e : broadcast(T(1))) * reciprocal<T>(T(1) + e);
}

// The logistic functions of any x, in lockstep.
template <typename T, int n>
inline __attribute__((always_inline)) void logistic(const Vec<T> (&x)[n], Vec<T> (&result)[n]) {
  Vec<T> e[n];
  each<n>([&](int k) { e[k] = negative_magnitude<T>(x[k]) * T(M_LOG2E); });
  exp2_nonpositive(e);
  each<n>([&](int k) { result[k] = logistic<T>(x[k], e[k]); });
}

// The logistic function of any x.
template <typename T>
inline Vec<T> logistic(const Vec<T>& x) {
  Vec<T> all[1] = {x}, result[1];
  logistic<T, 1>(all, result);
  return result[0];
}

}  // namespace spatial_mamba
