// LayerNorm over the channels of tokens, with or without a gate, and its gradients. A row of threads, each with
// kVectorChannels, handles a token, so that it is read once.
#pragma once

#include <algorithm>

#include "channel_vectors.cuh"

namespace spatial_mamba {

constexpr int kNormThreads = 256, kMostNormThreads = 512;  // of a block
// Blocks of kNormThreads that share a multiprocessor, and that are launched per multiprocessor.
constexpr int kNormBlocks = 4, kGatedNormBlocks = 3, kNormGradientBlocks = 3;
constexpr int blocks_at_once(int threads, int of_norm_threads) { return threads == kNormThreads ? of_norm_threads : 1; }
static_assert(kMostNormChannels == kMostNormThreads * kVectorChannels);

// The channels of a thread.
template <bool kFull>
struct NormPlace : ChannelPlace<kFull> {
  float inverse_dim;

  __device__ NormPlace(const Norm& norm, bool aligned)
      : ChannelPlace<kFull>{static_cast<int>(threadIdx.x) * kVectorChannels, norm.dim, aligned},
        inverse_dim(1.0f / norm.dim) {}
};

// Weights of any type, in float32.
template <class Place>
__device__ __forceinline__ void read_weights(const Activations& weights, const Place& place,
                                             float (&values)[kVectorChannels]) {
  switch (weights.type) {
    case Scalar::float32:
      return place.load(static_cast<const float*>(weights.data)).values(values);
    case Scalar::bfloat16:
      return place.load(static_cast<const __nv_bfloat16*>(weights.data)).values(values);
    case Scalar::float16:
      return place.load(static_cast<const __half*>(weights.data)).values(values);
  }
}

// Sums over the threads of a token. All threads of the block take part; memory: kCount floats per warp.
template <int kCount>
__device__ __forceinline__ void sum_over_token(float (&sums)[kCount], float* memory) {
  const int threads = blockDim.x;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance >= threads) continue;
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
#pragma unroll 1
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += of_token[warp * kCount + i];
  }
  __syncthreads();
}

// Normalises a token; returns the factor, 1 / sqrt(variance + eps).
template <class Place>
__device__ __forceinline__ float normalise(float (&y)[kVectorChannels], const Place& place, float eps, float* memory) {
  float mean[1] = {};
#pragma unroll
  for (const float value : y) mean[0] += value;
  sum_over_token(mean, memory);
  float variance[1] = {};
#pragma unroll
  for (int j = 0; j < kVectorChannels; ++j) {
    y[j] = place.has(j) ? y[j] - mean[0] * place.inverse_dim : 0.0f;
    variance[0] += y[j] * y[j];
  }
  sum_over_token(variance, memory);
  const float scale = rsqrtf(variance[0] * place.inverse_dim + eps);
#pragma unroll
  for (float& value : y) value *= scale;
  return scale;
}

// Calls visit(token, next) for the tokens of this thread. The whole block takes part in each call, so it is also called
// for tokens past the end.
template <class Visit>
__device__ __forceinline__ void over_tokens(int64_t tokens, const Visit& visit) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < tokens; first += step) {
    visit(first + threadIdx.y, first + threadIdx.y + step);
  }
}

template <class G, class Y, bool kGated, int kThreads, bool kFull>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kThreads, kGated ? kGatedNormBlocks : kNormBlocks))
    norm_kernel(const Norm norm, bool aligned, const G* gate, const Y* y, G* out) {
  const NormPlace<kFull> place(norm, aligned);
  float weight[kVectorChannels], bias[kVectorChannels];
  read_weights(norm.weight, place, weight);
  read_weights(norm.bias, place, bias);
  ChannelVector<Y> next_y;
  ChannelVector<G> next_gate;
  const auto load = [&](int64_t token) {
    if (token >= norm.tokens) return;
    next_y = place.load(y + token * norm.dim);
    if constexpr (kGated) next_gate = place.load(gate + token * norm.gate_stride);
  };
  load(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y);
  over_tokens(norm.tokens, [&](int64_t token, int64_t next) {
    float gates[kVectorChannels], values[kVectorChannels];
    next_y.values(values);
    if constexpr (kGated) next_gate.values(gates);
    load(next);
    normalise(values, place, norm.eps, shared_memory);
#pragma unroll
    for (int j = 0; j < kVectorChannels; ++j) {
      values[j] = values[j] * weight[j] + bias[j];
      if constexpr (kGated) values[j] *= gates[j] * sigmoid(gates[j]);
    }
    if (token < norm.tokens) place.write(out + token * norm.dim, values);
  });
}

// sums (2, blocks, dim): of the gradients of the weight, then of the bias.
template <class G, class Y, bool kGated, int kThreads, bool kFull>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kThreads, kNormGradientBlocks))
    norm_backward_kernel(const Norm norm, bool aligned, const G* gate, const Y* y, const G* grad_out, Y* grad_y,
                         G* grad_gate, int64_t grad_gate_stride, float* sums) {
  const NormPlace<kFull> place(norm, aligned);
  float weight[kVectorChannels], bias[kVectorChannels], of_weight[kVectorChannels] = {}, of_bias[kVectorChannels] = {};
  read_weights(norm.weight, place, weight);
  read_weights(norm.bias, place, bias);
  over_tokens(norm.tokens, [&](int64_t own_token, int64_t next) {
    const bool exists = own_token < norm.tokens;
    const int64_t token = exists ? own_token : norm.tokens - 1;
    float grad[kVectorChannels], gates[kVectorChannels], normed[kVectorChannels];
    place.load(y + token * norm.dim).values(normed);
    place.load(grad_out + token * norm.dim).values(grad);
    if constexpr (kGated) place.load(gate + token * norm.gate_stride).values(gates);
    if (next < norm.tokens) {
      place.prefetch(y + next * norm.dim);
      place.prefetch(grad_out + next * norm.dim);
      if constexpr (kGated) place.prefetch(gate + next * norm.gate_stride);
    }
    const float scale = normalise(normed, place, norm.eps, shared_memory);
    float along[2] = {};  // sums of the gradient, and of its product with the normalised token
#pragma unroll
    for (int j = 0; j < kVectorChannels; ++j) {
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
    for (int j = 0; j < kVectorChannels; ++j) {
      grad[j] = scale * (grad[j] - along[0] * place.inverse_dim - normed[j] * (along[1] * place.inverse_dim));
    }
    if (!exists) return;
    place.write(grad_y + token * norm.dim, grad);
    if constexpr (kGated) place.write(grad_gate + token * grad_gate_stride, gates);
  });

  const int padded_dim = blockDim.x * kVectorChannels, tokens = blockDim.y;
#pragma unroll
  for (int j = 0; j < kVectorChannels; ++j) {
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
  while (threads * kVectorChannels < norm.dim) threads *= 2;
  return dim3(threads, std::max(1, kNormThreads / threads));
}

inline int norm_blocks(const Norm& norm, int blocks_at_once) {
  const int64_t wanted = divide_up<int64_t>(norm.tokens, norm_block(norm).y);
  return static_cast<int>(std::min<int64_t>(wanted, blocks_at_once * attribute(cudaDevAttrMultiProcessorCount)));
}

// Calls body(gate, y) with typed pointers: without a gate, both are y.
template <bool kGated, class Body>
void with_gate_and_tokens(const Norm& norm, Activations gate, Body&& body) {
  if constexpr (kGated) {
    with_types(gate, norm.y, body);
  } else {
    with_type(norm.y, [&](auto* y) { body(y, y); });
  }
}

// Calls body(threads, full): the threads of a block, at most, and whether they are full.
template <class Body>
void with_norm_kernel(const Norm& norm, bool aligned, Body&& body) {
  const dim3 block = norm_block(norm);
  const bool full = aligned && norm.dim == static_cast<int>(block.x) * kVectorChannels;
  if (block.x * block.y > kNormThreads) return body(std::integral_constant<int, kMostNormThreads>(), std::false_type());
  const std::integral_constant<int, kNormThreads> threads;
  full ? body(threads, std::true_type()) : body(threads, std::false_type());
}

// `gate`: y, if there is none.
template <bool kGated>
void launch_norm(const char* name, const Norm& norm, Activations gate, Activations out, cudaStream_t stream) {
  const bool aligned =
      are_aligned(kVectorChannels, {norm.dim, norm.gate_stride}, {norm.y, norm.weight, norm.bias, gate, out});
  with_gate_and_tokens<kGated>(norm, gate, [&](auto* typed_gate, auto* y) {
    with_norm_kernel(norm, aligned, [&](auto threads, auto full) {
      using G = Element<decltype(typed_gate)>;
      using Y = Element<decltype(y)>;
      const dim3 block = norm_block(norm), grid(norm_blocks(norm, kGated ? kGatedNormBlocks : kNormBlocks));
      launch(name, norm_kernel<G, Y, kGated, threads, full>, grid, block, block.x * block.y / kWarp, stream, norm,
             aligned, static_cast<const G*>(typed_gate), static_cast<const Y*>(y), static_cast<G*>(out.data));
    });
  });
}

template <bool kGated>
void launch_norm_backward(const char* name, const Norm& norm, Activations gate, const NormGradients& gradients,
                          cudaStream_t stream) {
  const bool aligned = are_aligned(kVectorChannels, {norm.dim, norm.gate_stride, gradients.gate_stride},
                                   {norm.y, norm.weight, norm.bias, gate, gradients.out, gradients.y, gradients.gate});
  with_gate_and_tokens<kGated>(norm, gate, [&](auto* typed_gate, auto* y) {
    with_norm_kernel(norm, aligned, [&](auto threads, auto full) {
      using G = Element<decltype(typed_gate)>;
      using Y = Element<decltype(y)>;
      const dim3 block = norm_block(norm);
      launch(name, norm_backward_kernel<G, Y, kGated, threads, full>, dim3(norm_partial_sums(norm)), block,
             2 * kVectorChannels * block.x * block.y, stream, norm, aligned, static_cast<const G*>(typed_gate),
             static_cast<const Y*>(y), static_cast<const G*>(gradients.out.data), static_cast<Y*>(gradients.y.data),
             static_cast<G*>(gradients.gate.data), gradients.gate_stride, gradients.sums);
    });
  });
}

}  // namespace spatial_mamba
