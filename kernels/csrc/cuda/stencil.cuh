// The 25 taps of 3x3 kernels with dilations 1, 3 and 5, applied row by row: each row of a map is added to the eleven
// rows of sums within reach, which a thread keeps in registers, for a few neighbouring columns of one channel.
#pragma once

#include "common.cuh"

namespace spatial_mamba {

constexpr int kReach = 5;  // the largest dilation
constexpr int kTaps = 25;
constexpr int kRunOfColumns = 4;                     // per thread
constexpr int kWindow = kRunOfColumns + 2 * kReach;  // columns that they depend on
constexpr int kChannels = 16;  // per block: 16 values of float32 or bfloat16 are whole memory sectors
// Channels of one column in shared memory, padded so that the two halves of a warp use different banks.
constexpr int kPitch = kChannels + 4;
static_assert(kRunOfColumns * kPitch % 32 == 16);

// The column offset of tap t of a row that is `dilation` rows away: row 0 has taps of all dilations, the others three.
constexpr int tap_column(int dilation, int t) {
  constexpr int kOwnRow[] = {-5, -3, -1, 0, 1, 3, 5};
  return dilation == 0 ? kOwnRow[t] : (t - 1) * dilation;
}

// Sums of the five unfinished rows of one parity, two rows apart.
struct Sums {
  float rows[5][kRunOfColumns] = {};
};

// Taps in the order of their offsets (row, column): three each in the rows -5, -3 and -1, seven in row 0, and so on.
struct Stencil {
  float taps[kTaps];

  // The taps of one channel; mirrored for the adjoint, which adds to the places that the stencil reads.
  __device__ Stencil(const float* of_channel, int dim, bool mirrored) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) taps[t] = of_channel[static_cast<int64_t>(mirrored ? kTaps - 1 - t : t) * dim];
  }

  // Add row i, from the window, to all rows in `needed`, and complete row i - 5 in `done`.
  // `opposite` holds the sums of the other parity: those of rows i - 5 to i + 3 before, of i - 3 to i + 5 after.
  // `same` holds those of rows i - 4 to i + 4.
  template <class Needed>
  __device__ __forceinline__ void contribute(int i, const Needed& needed, const float (&window)[kWindow],
                                             Sums& opposite, Sums& same, float (&done)[kRunOfColumns]) const {
    const float nothing[kRunOfColumns] = {};
    float (&above)[5][kRunOfColumns] = opposite.rows;
    add_three<22, 5>(needed(i - 5), window, above[0], done);
    add_three<19, 3>(needed(i - 3), window, above[1], above[0]);
    add_three<16, 1>(needed(i - 1), window, above[2], above[1]);
    add_three<6, 1>(needed(i + 1), window, above[3], above[2]);
    add_three<3, 3>(needed(i + 3), window, above[4], above[3]);
    add_three<0, 5>(needed(i + 5), window, nothing, above[4]);
    if (!needed(i)) return;
#pragma unroll
    for (int k = 0; k < kRunOfColumns; ++k) {
#pragma unroll
      for (int t = 0; t < 7; ++t) same.rows[2][k] += taps[9 + t] * window[k + kReach + tap_column(0, t)];
    }
  }

 private:
  // to = from + the three taps from kFirst on, kDilation columns apart: the sums move up one place at the same time.
  template <int kFirst, int kDilation>
  __device__ __forceinline__ void add_three(bool needed, const float (&window)[kWindow],
                                            const float (&from)[kRunOfColumns], float (&to)[kRunOfColumns]) const {
#pragma unroll
    for (int k = 0; k < kRunOfColumns; ++k) to[k] = from[k];
    if (!needed) return;
#pragma unroll
    for (int k = 0; k < kRunOfColumns; ++k) {
#pragma unroll
      for (int t = 0; t < 3; ++t) to[k] += taps[kFirst + t] * window[k + kReach + tap_column(kDilation, t)];
    }
  }
};

// The window of a thread's columns in a row of shared memory, which begins kReach columns before the block's first one.
__device__ __forceinline__ void load_window(const float* row, float (&window)[kWindow]) {
  const float* columns = row + static_cast<int>(threadIdx.y) * kRunOfColumns * kPitch + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kWindow; ++j) window[j] = columns[j * kPitch];
}

// Threads along a row: even, so that all warps are full.
inline int segments_for(int columns) { return divide_up(columns, 2 * kRunOfColumns) * 2; }

// Number of bands of rows for images that need `blocks` blocks undivided: just enough to fill a GPU, because each band
// repeats work at its ends.
inline int bands_for(int64_t blocks, int height) {
  constexpr int64_t kBlocksThatFillAGpu = 512;
  constexpr int kFewestRows = 16;
  const int64_t wanted = divide_up(kBlocksThatFillAGpu, blocks > 0 ? blocks : 1);
  const int most = divide_up(height, kFewestRows);
  return wanted < most ? static_cast<int>(wanted) : most;
}

}  // namespace spatial_mamba
