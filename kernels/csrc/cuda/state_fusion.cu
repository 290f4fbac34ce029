// State fusion on maps (batch, H, W, dim) at any offsets: the gather with clamped indices, its adjoint, and the
// gradients of the taps and of C.
#include <algorithm>

#include "common.cuh"

namespace spatial_mamba {
namespace {

constexpr int kRun = 4;  // neighbouring columns per thread, which share the loads of the taps
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int kTapsPerBlock = 8;  // for the gradients of taps: one register each

__host__ __device__ int64_t runs_of(const Map& map) { return map.batch * map.height * divide_up(map.width, kRun); }

// The position of a warp: up to kRun neighbouring columns of a row, one channel per lane.
struct Run {
  int64_t image_start;  // index of the image's first element of this channel
  int64_t token;        // of the first column, counted over all images
  int row, column, columns;
  int channel;
  bool has_channel;

  __device__ Run(const Map& map, int64_t index) {
    const int per_row = divide_up(map.width, kRun);
    const int64_t row_index = index / per_row;
    const int64_t image = row_index / map.height;
    row = static_cast<int>(row_index % map.height);
    column = static_cast<int>(index % per_row) * kRun;
    columns = min(kRun, map.width - column);
    const int own_channel = blockIdx.y * kWarp + threadIdx.x;
    has_channel = own_channel < map.dim;
    channel = min(own_channel, map.dim - 1);
    image_start = image * map.height * map.width * map.dim + channel;
    token = row_index * map.width + column;
  }
};

__device__ inline int64_t first_run() { return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y; }

// The neighbours of a run at one offset. Columns after the end of the run are clamped to the image too.
template <class H>
__device__ void load_neighbours(float (&neighbours)[kRun], const Map& map, const Run& run, const H* h, int row_offset,
                                int column_offset) {
  const int row = clamp(run.row + row_offset, map.height);
  const H* states = h + run.image_start + static_cast<int64_t>(row) * map.width * map.dim;
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    neighbours[k] = load(states + static_cast<int64_t>(clamp(run.column + k + column_offset, map.width)) * map.dim);
  }
}

template <class H>
__device__ void gather(float (&fused)[kRun], const Map& map, const Run& run, const H* h, const float* taps,
                       const Offsets& offsets) {
#pragma unroll
  for (int k = 0; k < kRun; ++k) fused[k] = 0.0f;
  for (int t = 0; t < offsets.count; ++t) {
    const float tap = taps[static_cast<int64_t>(t) * map.dim + run.channel];
    float neighbours[kRun];
    load_neighbours(neighbours, map, run, h, offsets.row[t], offsets.column[t]);
#pragma unroll
    for (int k = 0; k < kRun; ++k) fused[k] += tap * neighbours[k];
  }
}

template <class H, class Out>
__global__ void __launch_bounds__(kThreads)
    fuse_kernel(Map map, const H* h, const float* taps, const __grid_constant__ Offsets offsets, Out* out) {
  if (first_run() >= runs_of(map)) return;
  const Run run(map, first_run());
  float fused[kRun];
  gather(fused, map, run, h, taps, offsets);
  if (!run.has_channel) return;
  for (int k = 0; k < run.columns; ++k) store(out + (run.token + k) * map.dim + run.channel, fused[k]);
}

template <class U, class Y>
__global__ void __launch_bounds__(kThreads)
    fuse_and_read_out_kernel(Map map, const float* h, const float* taps, const __grid_constant__ Offsets offsets,
                             const float* C, const U* u, const float* D, Y* y) {
  if (first_run() >= runs_of(map)) return;
  const Run run(map, first_run());
  float fused[kRun];
  gather(fused, map, run, h, taps, offsets);
  if (!run.has_channel) return;
  const float skip = D[run.channel];
  for (int k = 0; k < run.columns; ++k) {
    const int64_t element = (run.token + k) * map.dim + run.channel;
    store(y + element, C[run.token + k] * fused[k] + skip * load(u + element));
  }
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    read_out_gradient_kernel(Map map, const G* grad_y, const float* h, const float* taps,
                             const __grid_constant__ Offsets offsets, float* grad_C) {
  if (first_run() >= runs_of(map)) return;  // the same for the whole warp
  const Run run(map, first_run());
  float fused[kRun];
  gather(fused, map, run, h, taps, offsets);
  const int64_t tokens = map.batch * map.height * map.width;
  for (int k = 0; k < run.columns; ++k) {
    const float grad = run.has_channel ? load(grad_y + (run.token + k) * map.dim + run.channel) : 0.0f;
    const float sum = warp_sum(grad * fused[k]);
    if (threadIdx.x == 0) grad_C[blockIdx.y * tokens + run.token + k] = sum;
  }
}

// The positions whose neighbour at this offset, once clamped, is i: first to last, none if first > last.
struct Preimage {
  int first, last;

  __device__ Preimage(int i, int offset, int size)
      : first(max(i == 0 ? 0 : i - offset, 0)), last(min(i == size - 1 ? size - 1 : i - offset, size - 1)) {}
};

template <class G, class H>
__global__ void __launch_bounds__(kThreads)
    fuse_adjoint_kernel(Map map, const G* grad, const float* C, const float* taps,
                        const __grid_constant__ Offsets offsets, H* grad_h) {
  if (first_run() >= runs_of(map)) return;
  const Run run(map, first_run());
  const int64_t image_token = run.token - static_cast<int64_t>(run.row) * map.width - run.column;
  float sums[kRun] = {};
  for (int t = 0; t < offsets.count; ++t) {
    const float tap = taps[static_cast<int64_t>(t) * map.dim + run.channel];
    const Preimage rows(run.row, offsets.row[t], map.height);
    for (int i = rows.first; i <= rows.last; ++i) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        if (k >= run.columns) continue;
        const Preimage columns(run.column + k, offsets.column[t], map.width);
        for (int j = columns.first; j <= columns.last; ++j) {
          const int64_t token = image_token + static_cast<int64_t>(i) * map.width + j;
          const float scale = C == nullptr ? tap : tap * C[token];
          sums[k] += scale * load(grad + token * map.dim + run.channel);
        }
      }
    }
  }
  if (!run.has_channel) return;
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    if (k < run.columns) store(grad_h + (run.token + k) * map.dim + run.channel, sums[k]);
  }
}

// Each block sums kTapsPerBlock taps (blockIdx.z) of 32 channels (blockIdx.y) over its part of the tokens
// (blockIdx.x).
template <class G, class H>
__global__ void __launch_bounds__(kThreads)
    tap_gradients_kernel(Map map, const G* grad, const float* C, const H* h, const __grid_constant__ Offsets offsets,
                         float* grad_taps) {
  const int first_tap = blockIdx.z * kTapsPerBlock;
  float sums[kTapsPerBlock] = {};
  const int64_t runs = runs_of(map);
  for (int64_t index = first_run(); index < runs; index += static_cast<int64_t>(gridDim.x) * kWarpsPerBlock) {
    const Run run(map, index);
    float grad_fused[kRun] = {};
    for (int k = 0; k < run.columns; ++k) {
      const float value = load(grad + (run.token + k) * map.dim + run.channel);
      grad_fused[k] = C == nullptr ? value : value * C[run.token + k];
    }
#pragma unroll
    for (int t = 0; t < kTapsPerBlock; ++t) {
      if (first_tap + t >= offsets.count) continue;
      float neighbours[kRun];
      load_neighbours(neighbours, map, run, h, offsets.row[first_tap + t], offsets.column[first_tap + t]);
#pragma unroll
      for (int k = 0; k < kRun; ++k) sums[t] += grad_fused[k] * neighbours[k];
    }
  }

  float* of_warps = shared_memory;  // (warps, taps, lanes)
#pragma unroll
  for (int t = 0; t < kTapsPerBlock; ++t) of_warps[(threadIdx.y * kTapsPerBlock + t) * kWarp + threadIdx.x] = sums[t];
  __syncthreads();
  const int channel = blockIdx.y * kWarp + threadIdx.x;
  for (int t = threadIdx.y; t < kTapsPerBlock; t += kWarpsPerBlock) {
    if (first_tap + t >= offsets.count || channel >= map.dim) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) sum += of_warps[(warp * kTapsPerBlock + t) * kWarp + threadIdx.x];
    grad_taps[(static_cast<int64_t>(blockIdx.x) * offsets.count + first_tap + t) * map.dim + channel] = sum;
  }
}

dim3 block_shape() { return dim3(kWarp, kWarpsPerBlock); }

dim3 one_run_per_warp(const Map& map) {
  const int64_t blocks = divide_up<int64_t>(runs_of(map), kWarpsPerBlock);
  return dim3(static_cast<unsigned>(blocks), divide_up(map.dim, kWarp));
}

}  // namespace

int partial_sums(const Map& map) {
  constexpr int kBlocksThatFillAGpu = 2048;
  const int64_t wanted = divide_up(kBlocksThatFillAGpu, divide_up(map.dim, kWarp));
  const int64_t useful = divide_up<int64_t>(runs_of(map), kWarpsPerBlock);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({wanted, useful, 512})));
}

void fuse(const Map& map, Activations h, const float* taps, const Offsets& offsets, Activations fused,
          cudaStream_t stream) {
  if (streaming_serves(offsets)) return stream_fuse(map, h, taps, fused, stream);
  with_type(h, [&](auto* states) {
    launch("fuse", fuse_kernel<Element<decltype(states)>, Element<decltype(states)>>, one_run_per_warp(map),
           block_shape(), 0, stream, map, states, taps, offsets, static_cast<decltype(states)>(fused.data));
  });
}

void fuse_and_read_out(const Map& map, const float* h, const float* taps, const Offsets& offsets, const float* C,
                       Activations u, const float* D, Activations y, cudaStream_t stream) {
  with_types(u, y, [&](auto* tokens, auto* out) {
    launch("fuse_and_read_out", fuse_and_read_out_kernel<Element<decltype(tokens)>, Element<decltype(out)>>,
           one_run_per_warp(map), block_shape(), 0, stream, map, h, taps, offsets, C, tokens, D, out);
  });
}

int read_out_partial_sums(const Map& map) { return divide_up(map.dim, kWarp); }

void read_out_gradient(const Map& map, Activations grad_y, const float* h, const float* taps, const Offsets& offsets,
                       float* grad_C, cudaStream_t stream) {
  with_type(grad_y, [&](auto* grad) {
    launch("read_out_gradient", read_out_gradient_kernel<Element<decltype(grad)>>, one_run_per_warp(map), block_shape(),
           0, stream, map, grad, h, taps, offsets, grad_C);
  });
}

void fuse_adjoint(const Map& map, Activations grad, const float* C, const float* taps, const Offsets& offsets,
                  Activations grad_h, cudaStream_t stream) {
  if (streaming_serves(offsets)) return stream_adjoint(map, grad, C, taps, grad_h, stream);
  with_types(grad, grad_h, [&](auto* grad_fused, auto* out) {
    launch("fuse_adjoint", fuse_adjoint_kernel<Element<decltype(grad_fused)>, Element<decltype(out)>>,
           one_run_per_warp(map), block_shape(), 0, stream, map, grad_fused, C, taps, offsets, out);
  });
}

int tap_partial_sums(const Map& map, const Offsets& offsets) {
  return streaming_serves(offsets) ? stream_tap_gradients_partial_sums(map) : partial_sums(map);
}

void tap_gradients(const Map& map, Activations grad, const float* C, Activations h, const Offsets& offsets,
                   float* grad_taps, cudaStream_t stream) {
  if (streaming_serves(offsets)) return stream_tap_gradients(map, grad, C, h, grad_taps, stream);
  const dim3 grid(partial_sums(map), divide_up(map.dim, kWarp), divide_up(offsets.count, kTapsPerBlock));
  with_types(grad, h, [&](auto* grad_fused, auto* states) {
    launch("tap_gradients", tap_gradients_kernel<Element<decltype(grad_fused)>, Element<decltype(states)>>, grid,
           block_shape(), kWarpsPerBlock * kTapsPerBlock * kWarp, stream, map, grad_fused, C, states, offsets,
           grad_taps);
  });
}

}  // namespace spatial_mamba
