// Weights packed for oneDNN's microkernels, and products with them on one thread.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "transpose.h"

// PyTorch defines this macro if it exports the microkernels. oneDNN has those in float32 for AVX2 and AVX-512.
#if defined(CPUBLAS_BRGEMM_F32F32F32)
#define SPATIAL_MAMBA_MICROKERNELS 1
#endif

namespace spatial_mamba {

constexpr int64_t kColumns = 64;     // of a block of packed weights
constexpr int64_t kProductRows = 8;  // oneDNN generates code for each number of tokens, so most are multiples of this

// Inputs are packed in words: pairs for the half-precision types, as processors multiply them.
template <typename io>
constexpr int64_t kPair = sizeof(io) == 2 ? 2 : 1;

// Packs a weight (outputs, inputs) into (blocks, words, 64): the words of the inputs of 64 outputs, transposed.
template <typename io>
void pack(const io* weight, int64_t outputs, int64_t inputs, io* packed) {
  const int64_t words = inputs / kPair<io>;
  const auto* from = reinterpret_cast<const float*>(weight);
  auto* to = reinterpret_cast<float*>(packed);
  at::parallel_for(0, at::divup(outputs, kColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, outputs); first += kColumns) {
      const int64_t count = std::min(kColumns, outputs - first);
      transpose(from + first * words, words, count, words, to + first * words, kColumns);
    }
  });
}

// out (tokens, columns), with rows `stride` apart, = x (tokens, inputs) times the first columns of a packed block.
template <typename io>
void multiply_packed(const io* x, int64_t tokens, int64_t inputs, const io* block, int64_t columns, float* out,
                     int64_t stride) {
#if defined(SPATIAL_MAMBA_MICROKERNELS)
  at::native::cpublas::brgemm(tokens, columns, inputs, inputs, kColumns, stride, false, x, block, out, kPair<io> == 2);
#endif
}

inline void release_microkernels() {
#if defined(SPATIAL_MAMBA_MICROKERNELS)
  at::native::cpublas::brgemm_release();
#endif
}

// Releases what products hold of this thread's matrix units at the end of the scope.
struct Microkernels {
  ~Microkernels() { release_microkernels(); }
};

// Whether oneDNN has a microkernel for packed bfloat16: with matrix units (AMX), or with AVX-512's dot products alone.
inline bool multiplies_bfloat16() {
  constexpr int64_t kInputs = kPair<c10::BFloat16>;
  const c10::BFloat16 x[kInputs] = {}, block[kInputs * kColumns] = {};
  float out[kColumns];
  const Microkernels units;
  try {
    multiply_packed(x, 1, kInputs, block, kColumns, out, kColumns);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

inline bool can_pack(at::ScalarType dtype) {
#if defined(SPATIAL_MAMBA_MICROKERNELS)
  if (!at::globalContext().userEnabledMkldnn()) return false;
#if defined(__x86_64__)
  if (dtype == at::kFloat) return __builtin_cpu_supports("avx2");
#endif
  if (dtype == at::kBFloat16) {
    static const bool usable = at::native::cpublas::could_pack(dtype) || multiplies_bfloat16();
    return usable;
  }
  return dtype == at::kHalf && at::native::cpublas::could_pack(dtype);  // which is true for other types, too, on AMX
#else
  return false;
#endif
}

}  // namespace spatial_mamba
