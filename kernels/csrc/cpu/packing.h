// Weights packed for oneDNN's microkernels, and products with them on one thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace spatial_mamba {

constexpr int64_t kColumns = 64;  // outputs per block of packed weights

// Inputs are packed in pairs for the half-precision types, as matrix units read them.
template <typename io>
constexpr int64_t kPair = sizeof(io) == 2 ? 2 : 1;

inline bool can_pack(at::ScalarType dtype) {
#if defined(SPATIAL_MAMBA_TILE_PRODUCTS)
  if (dtype == at::kFloat) return true;
  return (dtype == at::kBFloat16 || dtype == at::kHalf) && at::native::cpublas::could_pack(dtype);
#else
  return false;
#endif
}

// Packs a weight (outputs, inputs) into (blocks, inputs, 64).
template <typename io>
void pack(const io* weight, int64_t outputs, int64_t inputs, io* packed) {
  const int64_t blocks = (outputs + kColumns - 1) / kColumns;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kColumns; n < std::min(end * kColumns, outputs); ++n) {
      io* block = packed + n / kColumns * inputs * kColumns;
      for (int64_t k = 0; k < inputs; ++k) {
        block[k / kPair<io> * kColumns * kPair<io> + n % kColumns * kPair<io> + k % kPair<io>] = weight[n * inputs + k];
      }
    }
  });
}

// out (tokens, columns), with rows `stride` apart, = x (tokens, inputs) times the first columns of a packed block.
template <typename io>
void multiply_packed(const io* x, int64_t tokens, int64_t inputs, const io* block, int64_t columns, float* out,
                     int64_t stride) {
#if defined(SPATIAL_MAMBA_TILE_PRODUCTS)
  at::native::cpublas::brgemm(tokens, columns, inputs, inputs, kColumns, stride, false, x, block, out, kPair<io> == 2);
#endif
}

// Call it on each thread after its last product.
inline void release_microkernels() {
#if defined(SPATIAL_MAMBA_TILE_PRODUCTS)
  at::native::cpublas::brgemm_release();
#endif
}

}  // namespace spatial_mamba
