// GELU of the hidden layer of an MLP, with its bias, and the gradients. A warp has kWarpChannels channels of one token
// after another, and loads the next token while it computes.
#include <algorithm>

#include "channel_vectors.cuh"

namespace spatial_mamba {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;  // of a block
constexpr int kBlocksAtOnce = 4;                      // per multiprocessor; more are not launched
constexpr int kWarpChannels = kWarp * kVectorChannels;

// Of the normal distribution.
__device__ inline float cumulative(float x) { return 0.5f + 0.5f * erff(0.707106781f * x); }
__device__ inline float density(float x) { return 0.398942280f * fast_exp(-0.5f * x * x); }

template <bool kFull>
__device__ ChannelPlace<kFull> place_in(const HiddenLayer& hidden, bool aligned) {
  return {static_cast<int>(blockIdx.y * kWarp + threadIdx.x) * kVectorChannels, hidden.dim, aligned};
}

__device__ inline int64_t first_token() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; }
__device__ inline int64_t token_step() { return static_cast<int64_t>(gridDim.x) * kWarps; }

template <class T, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    bias_gelu_kernel(const HiddenLayer hidden, bool aligned, const T* values, const T* bias, T* activated) {
  const ChannelPlace<kFull> place = place_in<kFull>(hidden, aligned);
  const int64_t step = token_step();
  int64_t token = first_token();
  ChannelVector<T> next;
  if (token < hidden.tokens) next = place.load(values + token * hidden.dim);
  float biases[kVectorChannels];
  place.load(bias).values(biases);
  for (; token < hidden.tokens; token += step) {
    float x[kVectorChannels];
    next.values(x);
    if (token + step < hidden.tokens) next = place.load(values + (token + step) * hidden.dim);
#pragma unroll
    for (int j = 0; j < kVectorChannels; ++j) {
      x[j] += biases[j];
      x[j] *= cumulative(x[j]);
    }
    place.write(activated + token * hidden.dim, x);
  }
}

template <class T, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    bias_gelu_backward_kernel(const HiddenLayer hidden, bool aligned, const T* values, const T* bias, T* grads,
                              T* activated, float* sums_of_blocks) {
  const ChannelPlace<kFull> place = place_in<kFull>(hidden, aligned);
  const int64_t step = token_step();
  int64_t token = first_token();
  ChannelVector<T> next, next_grad;
  const auto load = [&](int64_t token) {
    if (token >= hidden.tokens) return;
    next = place.load(values + token * hidden.dim);
    next_grad = place.load(grads + token * hidden.dim);
  };
  load(token);
  float biases[kVectorChannels], sums[kVectorChannels] = {};
  place.load(bias).values(biases);
  for (; token < hidden.tokens; token += step) {
    float x[kVectorChannels], grad[kVectorChannels];
    next.values(x);
    next_grad.values(grad);
    load(token + step);
#pragma unroll
    for (int j = 0; j < kVectorChannels; ++j) {
      x[j] += biases[j];
      const float passed = cumulative(x[j]);
      grad[j] *= passed + x[j] * density(x[j]);
      x[j] *= passed;
      sums[j] += grad[j];
    }
    place.write(activated + token * hidden.dim, x);
    place.write(grads + token * hidden.dim, grad);
  }

  float* of_warp = shared_memory + threadIdx.y * kWarpChannels;  // (warps, channels)
#pragma unroll
  for (int j = 0; j < kVectorChannels; ++j) of_warp[threadIdx.x * kVectorChannels + j] = sums[j];
  __syncthreads();
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const int64_t channel = blockIdx.y * kWarpChannels + thread;
  if (channel >= hidden.dim) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared_memory[warp * kWarpChannels + thread];
  sums_of_blocks[blockIdx.x * static_cast<int64_t>(hidden.dim) + channel] = sum;
}
static_assert(kThreads == kWarpChannels);

// A row of blocks per kWarpChannels.
dim3 grid_of(const HiddenLayer& hidden) {
  const int rows = divide_up(hidden.dim, kWarpChannels);
  const int at_once = std::max(1, kBlocksAtOnce * attribute(cudaDevAttrMultiProcessorCount) / rows);
  return dim3(static_cast<unsigned>(std::min<int64_t>(divide_up<int64_t>(hidden.tokens, kWarps), at_once)), rows);
}

// Calls body(full, values, bias) with typed pointers.
template <class Body>
void with_hidden(const HiddenLayer& hidden, bool aligned, Body&& body) {
  with_type(hidden.values, [&](auto* values) {
    const auto* bias = static_cast<decltype(values)>(hidden.bias.data);
    const bool full = aligned && hidden.dim % kWarpChannels == 0;
    full ? body(std::true_type(), values, bias) : body(std::false_type(), values, bias);
  });
}

}  // namespace

void bias_gelu(const HiddenLayer& hidden, Activations activated, cudaStream_t stream) {
  const bool aligned = are_aligned(kVectorChannels, {hidden.dim}, {hidden.values, hidden.bias, activated});
  with_hidden(hidden, aligned, [&](auto full, auto* values, auto* bias) {
    using T = Element<decltype(values)>;
    launch("bias_gelu", bias_gelu_kernel<T, full>, grid_of(hidden), dim3(kWarp, kWarps), 0, stream, hidden, aligned,
           values, bias, static_cast<T*>(activated.data));
  });
}

int bias_gelu_partial_sums(const HiddenLayer& hidden) { return static_cast<int>(grid_of(hidden).x); }

void bias_gelu_backward(const HiddenLayer& hidden, Activations grad, Activations activated, float* sums,
                        cudaStream_t stream) {
  const bool aligned = are_aligned(kVectorChannels, {hidden.dim}, {hidden.values, hidden.bias, grad, activated});
  with_hidden(hidden, aligned, [&](auto full, auto* values, auto* bias) {
    using T = Element<decltype(values)>;
    launch("bias_gelu_backward", bias_gelu_backward_kernel<T, full>, grid_of(hidden), dim3(kWarp, kWarps),
           kWarps * kWarpChannels, stream, hidden, aligned, values, bias, static_cast<T*>(grad.data),
           static_cast<T*>(activated.data), sums);
  });
}

}  // namespace spatial_mamba
