// LayerNorm over the channels of tokens, with or without a gate, and its gradients. A row of threads, each with
// kNormChannels, handles a token, so that it is read once.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace spatial_mamba {

constexpr int kNormThreads = 256, kMostNormThreads = 512;  // of a block
constexpr int kNormBlocks = 2048;                          // at most; enough to fill a GPU
constexpr int kGradientBlocksAtOnce = 3;                   // per multiprocessor
static_assert(kMostNormChannels == kMostNormThreads * kNormChannels);

template <class X>
struct alignas(kNormChannels * sizeof(X)) NormVector {
  X channels[kNormChannels];
};

// The channels of a thread: of one token after another, from `first` on.
struct NormPlace {
  int first, dim;
  bool whole;  // whether they can be read and written at once

  __device__ NormPlace(const Norm& norm)
      : first(threadIdx.x * kNormChannels), dim(norm.dim), whole(norm.aligned) {}

  __device__ bool has(int j) const { return first + j < dim; }

  // Channels beyond the last one are zero.
  template <class X>
  __device__ __forceinline__ void read(const X* token, float (&values)[kNormChannels]) const {
    if (whole) {
      NormVector<X> vector = {};
      if (first < dim) vector = *reinterpret_cast<const NormVector<X>*>(token + first);
#pragma unroll
      for (int j = 0; j < kNormChannels; ++j) values[j] = load(vector.channels + j);
    } else {
#pragma unroll
      for (int j = 0; j < kNormChannels; ++j) values[j] = has(j) ? load(token + first + j) : 0.0f;
    }
  }

  // Move a token that will be read later to the L2 cache.
  template <class X>
  __device__ __forceinline__ void prefetch(const X* token) const {
    if (first < dim) prefetch_to_cache(token + first);
  }

  template <class X>
  __device__ __forceinline__ void write(X* token, const float (&values)[kNormChannels]) const {
    if (whole) {
      NormVector<X> vector;
#pragma unroll
      for (int j = 0; j < kNormChannels; ++j) store(vector.channels + j, values[j]);
      if (first < dim) *reinterpret_cast<NormVector<X>*>(token + first) = vector;
    } else {
#pragma unroll
      for (int j = 0; j < kNormChannels; ++j) {
        if (has(j)) store(token + first + j, values[j]);
      }
    }
  }
};

// Weights of any type, in float32.
__device__ __forceinline__ void read_weights(const Activations& weights, const NormPlace& place,
                                             float (&values)[kNormChannels]) {
  switch (weights.type) {
    case Scalar::float32:
      return place.read(static_cast<const float*>(weights.data), values);
    case Scalar::bfloat16:
      return place.read(static_cast<const __nv_bfloat16*>(weights.data), values);
    case Scalar::float16:
      return place.read(static_cast<const __half*>(weights.data), values);
  }
}

// Sums over the threads of a token. All threads of the block take part; memory: kCount floats per warp.
template <int kCount>
__device__ __forceinline__ void sum_over_token(float (&sums)[kCount], float* memory) {
  const int threads = blockDim.x;
  for (int distance = min(threads, kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (threads <= kWarp) return;
  const int warps = threads / kWarp;
  float* of_token = memory + threadIdx.y * warps * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (threadIdx.x % kWarp == 0) of_token[threadIdx.x / kWarp * kCount + i] = sums[i];
    sums[i] = 0.0f;
  }
  __syncthreads();
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += of_token[warp * kCount + i];
  }
  __syncthreads();
}

// Normalises a token; returns the factor, 1 / sqrt(variance + eps).
__device__ __forceinline__ float normalise(float (&y)[kNormChannels], const NormPlace& place, float eps,
                                           float* memory) {
  float mean[1] = {};
#pragma unroll
  for (const float value : y) mean[0] += value;
  sum_over_token(mean, memory);
  float variance[1] = {};
#pragma unroll
  for (int j = 0; j < kNormChannels; ++j) {
    y[j] = place.has(j) ? y[j] - mean[0] / place.dim : 0.0f;
    variance[0] += y[j] * y[j];
  }
  sum_over_token(variance, memory);
  const float scale = rsqrtf(variance[0] / place.dim + eps);
#pragma unroll
  for (float& value : y) value *= scale;
  return scale;
}

// Calls visit(token, exists, next) for the tokens of this thread. The whole block takes part in each call, with the
// last token in place of missing ones.
template <class Visit>
__device__ __forceinline__ void over_tokens(int64_t tokens, const Visit& visit) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < tokens; first += step) {
    const int64_t token = first + threadIdx.y;
    visit(min(token, tokens - 1), token < tokens, min(token + step, tokens - 1));
  }
}

template <class G, class Y, bool kGated>
__global__ void __launch_bounds__(kMostNormThreads) norm_kernel(const Norm norm, const G* gate, const Y* y, G* out) {
  const NormPlace place(norm);
  float weight[kNormChannels], bias[kNormChannels];
  read_weights(norm.weight, place, weight);
  read_weights(norm.bias, place, bias);
  over_tokens(norm.tokens, [&](int64_t token, bool exists, int64_t) {
    float gates[kNormChannels], values[kNormChannels];
    place.read(y + token * norm.dim, values);
    if constexpr (kGated) place.read(gate + token * norm.gate_stride, gates);
    normalise(values, place, norm.eps, shared_memory);
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j) {
      values[j] = values[j] * weight[j] + bias[j];
      if constexpr (kGated) values[j] *= gates[j] * sigmoid(gates[j]);
    }
    if (exists) place.write(out + token * norm.dim, values);
  });
}

// sums (2, blocks, dim): of the gradients of the weight, then of the bias.
template <class G, class Y, bool kGated, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kNormThreads ? kGradientBlocksAtOnce : 1)
    norm_backward_kernel(const Norm norm, const G* gate, const Y* y, const G* grad_out, Y* grad_y, G* grad_gate,
                         int64_t grad_gate_stride, float* sums) {
  const NormPlace place(norm);
  float weight[kNormChannels], bias[kNormChannels], of_weight[kNormChannels] = {}, of_bias[kNormChannels] = {};
  read_weights(norm.weight, place, weight);
  read_weights(norm.bias, place, bias);
  over_tokens(norm.tokens, [&](int64_t token, bool exists, int64_t next) {
    float grad[kNormChannels], gates[kNormChannels], normed[kNormChannels];
    place.read(y + token * norm.dim, normed);
    place.read(grad_out + token * norm.dim, grad);
    place.prefetch(y + next * norm.dim);
    place.prefetch(grad_out + next * norm.dim);
    if constexpr (kGated) {
      place.read(gate + token * norm.gate_stride, gates);
      place.prefetch(gate + next * norm.gate_stride);
    }
    const float scale = normalise(normed, place, norm.eps, shared_memory);
    float along[2] = {};  // sums of the gradient, and of its product with the normalised token
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j) {
      if constexpr (kGated) {
        const float opening = sigmoid(gates[j]), grad_silu = grad[j] * (normed[j] * weight[j] + bias[j]);
        grad[j] *= gates[j] * opening;
        gates[j] = grad_silu * opening * (1.0f + gates[j] * (1.0f - opening));  // its gradient
      }
      if (exists) {
        of_weight[j] += grad[j] * normed[j];
        of_bias[j] += grad[j];
      }
      grad[j] *= weight[j];
      along[0] += grad[j];
      along[1] += grad[j] * normed[j];
    }
    sum_over_token(along, shared_memory);
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j) {
      grad[j] = scale * (grad[j] - along[0] / place.dim - normed[j] * (along[1] / place.dim));
    }
    if (!exists) return;
    place.write(grad_y + token * norm.dim, grad);
    if constexpr (kGated) place.write(grad_gate + token * grad_gate_stride, gates);
  });

  const int padded_dim = blockDim.x * kNormChannels, tokens = blockDim.y;
#pragma unroll
  for (int j = 0; j < kNormChannels; ++j) {
    const int channel = threadIdx.y * padded_dim + place.first + j;
    shared_memory[channel] = of_weight[j];
    shared_memory[tokens * padded_dim + channel] = of_bias[j];
  }
  __syncthreads();
  const int threads = blockDim.x * blockDim.y;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < 2 * norm.dim; i += threads) {
    const int which = i / norm.dim, channel = i % norm.dim;
    float sum = 0.0f;
    for (int token = 0; token < tokens; ++token) sum += shared_memory[(which * tokens + token) * padded_dim + channel];
    sums[(static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * norm.dim + channel] = sum;
  }
}

// Threads per token, and tokens per block.
inline dim3 norm_block(const Norm& norm) {
  int threads = 4;
  while (threads * kNormChannels < norm.dim) threads *= 2;
  return dim3(threads, std::max(1, kNormThreads / threads));
}

inline int norm_blocks(const Norm& norm, int most) {
  const int64_t tokens = norm_block(norm).y;
  return static_cast<int>(std::min<int64_t>(most, divide_up(norm.tokens, tokens)));
}

template <bool kGated, class G, class Y>
void launch_norm(const char* name, const Norm& norm, const G* gate, const Y* y, G* out, cudaStream_t stream) {
  const dim3 block = norm_block(norm);
  launch(name, norm_kernel<G, Y, kGated>, dim3(norm_blocks(norm, kNormBlocks)), block, block.x * block.y / kWarp,
         stream, norm, gate, y, out);
}

template <bool kGated, class G, class Y>
void launch_norm_backward(const char* name, const Norm& norm, const G* gate, const Y* y, const NormGradients& gradients,
                          cudaStream_t stream) {
  const dim3 block = norm_block(norm);
  const auto kernel = block.x * block.y <= kNormThreads ? norm_backward_kernel<G, Y, kGated, kNormThreads>
                                                        : norm_backward_kernel<G, Y, kGated, kMostNormThreads>;
  launch(name, kernel, dim3(norm_partial_sums(norm)), block,
         2 * kNormChannels * block.x * block.y, stream, norm, gate, y, static_cast<const G*>(gradients.out.data),
         static_cast<Y*>(gradients.y.data), static_cast<G*>(gradients.gate.data), gradients.gate_stride,
         gradients.sums);
}

}  // namespace spatial_mamba
