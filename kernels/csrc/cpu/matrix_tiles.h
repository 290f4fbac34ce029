// Products of blocks of bfloat16 on the matrix units of x86 processors (AMX), chosen at run time.
//
// oneDNN's microkernels use them, too, but looking up a kernel takes as long as a product of this size.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "packing.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SPATIAL_MAMBA_MATRIX_TILES 1
#endif

namespace spatial_mamba {

constexpr int64_t kTileRows = 32;    // tokens of a block
constexpr int64_t kTileInputs = 32;  // inputs per step

// Whether this processor has matrix units, and the operating system lets this process use them.
inline bool has_matrix_tiles() {
#if defined(SPATIAL_MAMBA_MATRIX_TILES)
  static const bool usable = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable;
#else
  return false;
#endif
}

#if defined(SPATIAL_MAMBA_MATRIX_TILES)

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Prepares the matrix units of this thread: all tiles have 16 rows of 64 bytes.
__attribute__((target("amx-tile"))) inline void configure_tiles() {
  // A constant, because GCC 12 takes only the first bytes for used and would not write the others.
  static constexpr TileConfiguration configuration;
  _tile_loadconfig(&configuration);
}

__attribute__((target("amx-tile"))) inline void release_tiles() { _tile_release(); }

// sums (32, 64) = x (32, inputs) times a packed block (inputs / 2, 64, 2). Calls between(k) at each of the inputs / 16
// steps, so that vector units work while the matrix units do.
template <typename Between>
__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(const c10::BFloat16* x, int64_t inputs,
                                                                        const c10::BFloat16* block, float* sums,
                                                                        const Between& between) {
  asm volatile("" ::: "memory");  // GCC 12 does not know that loads of tiles read memory
  for (int column = 0; column < kColumns; column += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs; k += kTileInputs) {
      const c10::BFloat16* weights = block + k * kColumns + 2 * column;
      _tile_loadd(4, x + k, 2 * inputs);
      _tile_loadd(6, weights, 4 * kColumns);
      _tile_loadd(7, weights + 32, 4 * kColumns);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x + 16 * inputs + k, 2 * inputs);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between(column / 32 * (inputs / kTileInputs) + k / kTileInputs);
    }
    _tile_stored(0, sums + column, 4 * kColumns);
    _tile_stored(1, sums + column + 16, 4 * kColumns);
    _tile_stored(2, sums + 16 * kColumns + column, 4 * kColumns);
    _tile_stored(3, sums + 16 * kColumns + column + 16, 4 * kColumns);
  }
}

#else

inline void configure_tiles() {}
inline void release_tiles() {}
template <typename Between>
inline void multiply_tiles(const c10::BFloat16*, int64_t, const c10::BFloat16*, float*, const Between&) {}

#endif

}  // namespace spatial_mamba
