// Depthwise 3x3 convolution with zero padding, its adjoint, and the gradients of its weights. A thread moves down two
// columns of one or two channels, so that it reads each row once.
#include "conv_places.cuh"

namespace spatial_mamba {
namespace {

constexpr int kGradientBlocks = 5;  // per multiprocessor

template <class V>
__device__ V load_bias(const DepthwiseConv& conv, int channel) {
  return conv.bias == nullptr ? V(0.0f) : per_channel<V>(conv.bias + channel);
}

template <int kFirst, class V>
__device__ __forceinline__ V add_row(V sum, const V (&taps)[kConvTaps], const V (&values)[kColumns + 2], int k) {
#pragma unroll
  for (int t = 0; t < 3; ++t) sum += taps[kFirst + t] * values[k + t];
  return sum;
}

template <class V, class T, bool kSilu>
__global__ void __launch_bounds__(kWarps* kWarp)
    convolve_kernel(const DepthwiseConv conv, const Places places, const T* x, T* out, int64_t out_stride) {
  const Map& map = conv.map;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= places.count) return;
  const Place<V> place(map, places, index);
  V taps[kConvTaps];
  load_taps(conv.weight, place.channel, taps, conv.mirrored);
  if (conv.residual) taps[kConvTaps / 2] += 1.0f;
  const V bias = load_bias<V>(conv, place.channel);
  Columns<kColumns + 2, V, const T> source(map, x, conv.stride, place.image, place.row - 1, place.column - 1,
                                           place.channel);
  Columns<kColumns, V, T> target(map, out, out_stride, place.image, place.row, place.column, place.channel);
  const int end = min(place.rows + 1, map.height - place.row);  // of the rows to load
  typename Columns<kColumns + 2, V, const T>::Row loaded;
  source.load(place.row > 0, loaded);
  V before[kColumns] = {}, here[kColumns] = {};  // sums of the last row and of this one, so far
#pragma unroll 2
  for (int i = -1; i <= place.rows; ++i) {
    V values[kColumns + 2], done[kColumns];
    values_of(loaded, values);
    source.load(i + 1 < end, loaded);  // the next row, while this one is used
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      done[k] = add_row<6>(before[k], taps, values, k);
      before[k] = add_row<3>(here[k], taps, values, k);
      here[k] = add_row<0>(bias, taps, values, k);
      if constexpr (kSilu) done[k] = done[k] * each(sigmoid, done[k]);
    }
    if (i > 0) target.store(place.has_channel, done);
  }
}

// sums (blocks, 10 dim): the gradients of the taps of all channels, (dim, 9), then of the biases.
template <class V, class T, bool kSilu>
__global__ void __launch_bounds__(kWarps* kWarp, kGradientBlocks)
    conv_gradients_kernel(const DepthwiseConv conv, const Places places, const T* x, const T* grad_out,
                          T* grad_convolved, float* sums_of_blocks) {
  const Map& map = conv.map;
  V taps[kConvTaps], sums[kConvTaps + 1] = {};
  const Place<V> first(map, places, 0);
  const int channel = first.channel;
  if constexpr (kSilu) load_taps(conv.weight, channel, taps);
  const V bias = load_bias<V>(conv, channel);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; index < places.count; index += step) {
    const Place<V> place(map, places, index);
    Columns<kColumns + 2, V, const T> source(map, x, conv.stride, place.image, place.row - 1, place.column - 1,
                                             channel);
    Columns<kColumns, V, const T> of_out(map, grad_out, map.dim, place.image, place.row, place.column, channel);
    Columns<kColumns, V, T> target(map, grad_convolved, map.dim, place.image, place.row, place.column, channel);
    const int end = min(place.rows + 1, map.height - place.row);  // of the rows to load
    typename Columns<kColumns + 2, V, const T>::Row loaded;
    typename Columns<kColumns, V, const T>::Row loaded_grads;
    V rows[3][kColumns + 2];
    source.load(place.row > 0, loaded);
    values_of(loaded, rows[0]);
    source.load(true, loaded);
    values_of(loaded, rows[1]);
    source.load(1 < end, loaded);
    of_out.load(true, loaded_grads);
#pragma unroll 1
    for (int i = 0; i < place.rows; ++i) {
      V grads[kColumns];
      values_of(loaded, rows[2]);
      values_of(loaded_grads, grads);
      source.load(i + 2 < end, loaded);  // what is next, while this is used
      of_out.load(i + 1 < place.rows, loaded_grads);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if constexpr (kSilu) {
          const V convolved =
              add_row<6>(add_row<3>(add_row<0>(bias, taps, rows[0], k), taps, rows[1], k), taps, rows[2], k);
          const V opening = each(sigmoid, convolved);
          grads[k] = grads[k] * opening * (V(1.0f) + convolved * (V(1.0f) + V(-1.0f) * opening));
          if (place.column + k >= map.width) grads[k] = V(0.0f);  // what was convolved there may be infinite
        }
#pragma unroll
        for (int t = 0; t < kConvTaps; ++t) sums[t] += grads[k] * rows[t / 3][k + t % 3];
        sums[kConvTaps] += grads[k];
      }
      if constexpr (kSilu) target.store(place.has_channel, grads);
#pragma unroll
      for (int k = 0; k < kColumns + 2; ++k) {
        rows[0][k] = rows[1][k];
        rows[1][k] = rows[2][k];
      }
    }
  }

  store_sums(sums, channel, first.has_channel, map.dim, sums_of_blocks);
}

}  // namespace

void depthwise_conv(const DepthwiseConv& conv, Activations out, int64_t out_stride, cudaStream_t stream) {
  const bool paired = are_aligned(2, {conv.map.dim, conv.stride, out_stride}, {conv.x, out});
  with_channels(conv.x, paired, [&](auto channels, auto* x) {
    using V = decltype(channels);
    using T = Element<decltype(x)>;
    const dim3 grid(static_cast<unsigned>(place_blocks(conv.map)), channel_blocks<V>(conv.map));
    launch("depthwise_conv", conv.silu ? convolve_kernel<V, T, true> : convolve_kernel<V, T, false>, grid,
           dim3(kWarp, kWarps), 0, stream, conv, Places(conv.map), x, static_cast<T*>(out.data), out_stride);
  });
}

int depthwise_conv_partial_sums(const Map& map) { return gradient_blocks(map, kGradientBlocks); }

void depthwise_conv_gradients(const DepthwiseConv& conv, Activations grad_out, Activations grad_convolved, float* sums,
                              cudaStream_t stream) {
  const bool paired = are_aligned(2, {conv.map.dim, conv.stride}, {conv.x, grad_out, grad_convolved});
  with_channels(conv.x, paired, [&](auto channels, auto* x) {
    using V = decltype(channels);
    using T = Element<decltype(x)>;
    const dim3 grid(depthwise_conv_partial_sums(conv.map), channel_blocks<V>(conv.map));
    const auto kernel = conv.silu ? conv_gradients_kernel<V, T, true> : conv_gradients_kernel<V, T, false>;
    launch("depthwise_conv_gradients", kernel, grid, dim3(kWarp, kWarps),
           shared_floats_of_sums<V>(kConvTaps + 1), stream, conv, Places(conv.map), x,
           static_cast<const T*>(grad_out.data), static_cast<T*>(grad_convolved.data), sums);
  });
}

}  // namespace spatial_mamba
