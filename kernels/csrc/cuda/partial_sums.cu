// Sums of the partial sums that blocks leave in memory, several at a time, in a fixed order.
#include "common.cuh"

namespace spatial_mamba {
namespace {

constexpr int kRows = 8;  // of threads in a block, which computes kWarp neighbouring sums

struct AllSums {
  PartialSums sums[kMostPartialSums];
  int count;
};

__host__ __device__ int64_t blocks_of(const PartialSums& sums) { return divide_up<int64_t>(sums.size, kWarp); }

__global__ void __launch_bounds__(kRows* kWarp) add_kernel(const __grid_constant__ AllSums all) {
  int64_t block = blockIdx.x;
  int which = 0;
  for (; block >= blocks_of(all.sums[which]); ++which) block -= blocks_of(all.sums[which]);
  const PartialSums& sums = all.sums[which];
  const int64_t i = block * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (i < sums.size) {
#pragma unroll 8
    for (int part = threadIdx.y; part < sums.count; part += kRows) sum += sums.parts[part * sums.stride + i];
  }
  shared_memory[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= sums.size) return;
#pragma unroll
  for (int row = 1; row < kRows; ++row) sum += shared_memory[row * kWarp + threadIdx.x];
  sums.result[i * sums.result_stride] = sum;
}

}  // namespace

void add_partial_sums(const PartialSums* sums, int count, cudaStream_t stream) {
  AllSums all = {};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    if (sums[i].size == 0) continue;
    all.sums[all.count++] = sums[i];
    blocks += blocks_of(sums[i]);
  }
  launch("partial_sums", add_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kWarp, kRows), kRows * kWarp, stream,
         all);
}

}  // namespace spatial_mamba
