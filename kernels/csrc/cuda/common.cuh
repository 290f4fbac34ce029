// Helpers for all kernels: conversions, softplus, sums over a warp, launches with error checks.
#pragma once

#include <cfloat>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "launchers.h"

// All shared memory is dynamic; kernels divide it into arrays with `take`.
extern __shared__ __align__(16) float shared_memory[];

namespace spatial_mamba {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float* take(float*& memory, int count) {
  float* array = memory;
  memory += count;
  return array;
}

template <class X>
__device__ inline X* at_byte(X* array, unsigned offset) {
  using Byte = std::conditional_t<std::is_const_v<X>, const char, char>;
  return reinterpret_cast<X*>(reinterpret_cast<Byte*>(array) + offset);
}

__device__ inline float load(const float* source) { return *source; }
__device__ inline float load(const __nv_bfloat16* source) { return __bfloat162float(*source); }
__device__ inline float load(const __half* source) { return __half2float(*source); }

__device__ inline void store(float* target, float value) { *target = value; }
__device__ inline void store(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }
__device__ inline void store(__half* target, float value) { *target = __float2half_rn(value); }

// 2^x in one instruction, with a relative error of 2e-7; results below 2^-126 are zero.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

// 1 / x in one instruction, with a relative error of 1e-7.
__device__ inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.0f / x;
#endif
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// exp(x), with a relative error of 1e-7 (1 + |x|).
__device__ inline float fast_exp(float x) { return exp2_fast(kLog2E * x); }

// log(1 + x) for x in [0, 1]: log1p(x) / x as a polynomial, interpolated at Chebyshev nodes; relative error 2e-7, also
// for tiny x. With kBase = 2, the logarithm to base 2.
template <int kBase = 0>
__device__ inline float log1p_of_unit(float x) {
  constexpr float kScale = kBase == 2 ? kLog2E : 1.0f;
  constexpr float kCoefficients[] = {0.00512610190f, -0.0290740654f, 0.0775160864f, -0.136022478f, 0.190768808f,
                                     -0.248353988f,  0.333181202f,   -0.499994457f, 0.99999994f};
  float sum = kScale * kCoefficients[0];
#pragma unroll
  for (int i = 1; i < 9; ++i) sum = sum * x + kScale * kCoefficients[i];
  return sum * x;
}

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1p_of_unit(fast_exp(-fabsf(x))); }
__device__ inline float sigmoid(float x) { return reciprocal(1.0f + fast_exp(-x)); }

// softplus(x) / ln 2, from x / ln 2.
__device__ inline float softplus_base2(float x) { return fmaxf(x, 0.0f) + log1p_of_unit<2>(exp2_fast(-fabsf(x))); }
__device__ inline float sigmoid_base2(float x) { return reciprocal(1.0f + exp2_fast(-x)); }

// -exp(A_log), at most FLT_MAX in size: its product with a delta of zero must not be NaN.
__device__ inline float rate_of(float A_log) {
  const float rate = -expf(A_log);
  return rate < -FLT_MAX ? -FLT_MAX : rate;
}

// Starts to copy a value of 4, 8 or 16 bytes to shared memory; the thread can read it after `wait_for_copies`.
template <class Value>
__device__ inline void copy_async(Value* shared, const Value* global) {
  __pipeline_memcpy_async(shared, global, sizeof(Value));
}
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Moves the data at an address to the L2 cache.
__device__ inline void prefetch_to_cache(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// The compiler moves no access to memory across this: loads made too early would take too many registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// The compiler computes the value up to here without branches, and what follows from it not before.
__device__ inline void settle(float& value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value));
#endif
}
__device__ inline void settle(unsigned& bits) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(bits));
#endif
}

__device__ inline int clamp(int i, int size) { return min(max(i, 0), size - 1); }

__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// One or more steps of a recurrence, as a map of the state before them: h -> decay h + input.
template <class V>
struct alignas(2 * sizeof(V)) AffineMap {
  V decay = 1.0f, input = 0.0f;

  __device__ V operator()(V h) const { return decay * h + input; }
  __device__ AffineMap then(AffineMap next) const { return {decay * next.decay, next(input)}; }
};

using Affine = AffineMap<float>;

template <class T>
__host__ __device__ constexpr T divide_up(T count, T by) {
  return (count + by - 1) / by;
}

// Of the current GPU.
inline int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Whether a block can have this much shared memory.
inline bool fits_shared_memory(size_t floats) {
  return floats * sizeof(float) <= static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_floats,
            cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_floats * sizeof(float);
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  if (config.dynamicSmemBytes > kSharedBytesWithoutAsking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.dynamicSmemBytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next kernel of the process, whichever it is, would report this error
  const auto shape = [](dim3 size) {
    return std::to_string(size.x) + "x" + std::to_string(size.y) + "x" + std::to_string(size.z);
  };
  throw std::runtime_error(std::string("CUDA kernel ") + name + ": " + cudaGetErrorString(error) + " (grid " +
                           shape(grid) + ", block " + shape(block) + ", " + std::to_string(config.dynamicSmemBytes) +
                           " bytes of shared memory); SPATIAL_MAMBA_BACKEND=triton or torch selects another backend");
}

template <class Pointer>
using Element = std::remove_pointer_t<Pointer>;

// Call `body` with the typed pointer.
template <class Body>
void with_type(Activations x, Body&& body) {
  switch (x.type) {
    case Scalar::float32:
      return body(static_cast<float*>(x.data));
    case Scalar::bfloat16:
      return body(static_cast<__nv_bfloat16*>(x.data));
    case Scalar::float16:
      return body(static_cast<__half*>(x.data));
  }
}

// Call `body` with two typed pointers; the second has the type of the first or float32, other pairs are not compiled.
template <class Body>
void with_types(Activations x, Activations same_or_float32, Body&& body) {
  with_type(x, [&](auto* typed) {
    if (same_or_float32.type == x.type) return body(typed, static_cast<decltype(typed)>(same_or_float32.data));
    if (same_or_float32.type == Scalar::float32) return body(typed, static_cast<float*>(same_or_float32.data));
    throw std::invalid_argument("a CUDA kernel does not support this pair of types");
  });
}

}  // namespace spatial_mamba
