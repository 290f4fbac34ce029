// Stands in for the CUDA runtime: with this folder first on the include path, a C++ compiler builds CUDA kernels for
// the CPU, where they run one block at a time and every thread of it as a fiber.
//
// Barriers and shuffles are where fibers wait for each other; divergent or missing ones abort with a message. Between
// them the threads run in a random order, so that a missing barrier shows as a wrong result. Before each block its
// shared memory is filled with NaN, and behind its end a canary is watched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// --- Launches --------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace cuda_emulator {

// Run one kernel on the whole grid, or say why a GPU would refuse the launch.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, size_t argument_bytes,
                const std::function<void()>& thread);

// Wait until all threads of the block are at the same barrier.
void wait_for_block(const char* file, int line);

// Wait until all threads of the warp are at the same place; returns the bits given by the thread of lane `source`.
uint32_t exchange(uint32_t bits, int source, const char* file, int line);

int lane();

// The source is counted within groups of `width` lanes.
template <class T>
T shuffle(T value, const char* file, int line, int source, int width = 32) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int first = lane() / width * width;
  bits = exchange(bits, source >= 0 && source < width ? first + source : lane(), file, line);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

}  // namespace cuda_emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  return cuda_emulator::run(*config, reinterpret_cast<const void*>(kernel), sizeof values,
                            [&] { std::apply(kernel, values); });
}

// --- Inside kernels; all lanes of a warp take part in each exchange --------------------------------------------------

#define __syncthreads() cuda_emulator::wait_for_block(__FILE__, __LINE__)
#define __syncwarp() ((void)cuda_emulator::exchange(0, cuda_emulator::lane(), __FILE__, __LINE__))
#define __shfl_sync(mask, value, ...) cuda_emulator::shuffle(value, __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(mask, value, distance) __shfl_sync(mask, value, cuda_emulator::lane() - (distance))
#define __shfl_down_sync(mask, value, distance) __shfl_sync(mask, value, cuda_emulator::lane() + (distance))
#define __shfl_xor_sync(mask, value, bits) __shfl_sync(mask, value, cuda_emulator::lane() ^ (bits))

// As inexact as the hardware: off by up to 2^-22 to either side, except at 1, and zero instead of subnormal.
inline float inexact(float value) {
  if (value == 1.0f) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  value *= 1.0f + (static_cast<int>(bits * 2654435761u >> 30) - 1.5f) * 0x1p-22f / 1.5f;
  return std::fabs(value) < 0x1p-126f ? 0.0f : value;
}
#define exp2f(x) inexact(std::exp2(static_cast<float>(x)))
#define rsqrtf(x) inexact(1.0f / std::sqrt(static_cast<float>(x)))
