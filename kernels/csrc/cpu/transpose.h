// Transposes of matrices, in blocks of vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vec.h"

namespace spatial_mamba {

// Transposes a block of at most 8x8 values.
template <typename T>
void transpose_block(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    if (rows == 8 && columns == 8) {
      __m256 x[8], y[8];
      each<8>([&](int k) { x[k] = _mm256_loadu_ps(from + k * stride); });
      each<4>([&](int k) {
        y[2 * k] = _mm256_unpacklo_ps(x[2 * k], x[2 * k + 1]);
        y[2 * k + 1] = _mm256_unpackhi_ps(x[2 * k], x[2 * k + 1]);
      });
      each<4>([&](int k) {
        const int pair = k / 2 * 4 + k % 2;
        x[k / 2 * 4 + k % 2 * 2] = _mm256_shuffle_ps(y[pair], y[pair + 2], 0x44);
        x[k / 2 * 4 + k % 2 * 2 + 1] = _mm256_shuffle_ps(y[pair], y[pair + 2], 0xee);
      });
      each<4>([&](int k) {
        _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(x[k], x[k + 4], 0x20));
        _mm256_storeu_ps(to + (k + 4) * to_stride, _mm256_permute2f128_ps(x[k], x[k + 4], 0x31));
      });
      return;
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    // Copied as bytes, since words of two half-precision numbers may be misaligned.
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + j * to_stride + i, from + i * stride + j, sizeof(T));
  }
}

// Writes the transpose of a matrix (rows, columns).
template <typename T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  for_tiles(columns, 8, [&](int64_t column, int64_t width) {
    for_tiles(rows, 8, [&](int64_t row, int64_t height) {
      transpose_block(from + row * stride + column, stride, height, width, to + column * to_stride + row, to_stride);
    });
  });
}

}  // namespace spatial_mamba
