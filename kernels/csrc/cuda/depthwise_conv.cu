// Depthwise 3x3 convolution with zero padding, its adjoint, and the gradients of its weights. A thread moves down two
// columns of one or two channels, so that it reads each row once.
#include <algorithm>

#include "channels.cuh"

namespace spatial_mamba {
namespace {

constexpr int kConvTaps = 9, kColumns = 2, kMostRows = 14;  // of a thread
constexpr int kWarps = 4;                                    // of a block, which have different places
constexpr int kRowsAhead = 3;                                // to the L2 cache
constexpr int kGradientBlocks = 640;  // with five of them per multiprocessor, they fill a GPU

// The division of maps into places: bands of rows, and a few columns.
struct Places {
  int rows, bands, across;
  int64_t count;

  explicit Places(const Map& map)
      : rows(divide_up(map.height, divide_up(map.height, kMostRows))),
        bands(divide_up(map.height, rows)),
        across(divide_up(map.width, kColumns)),
        count(map.batch * bands * across) {}
};

int64_t place_blocks(const Map& map) { return divide_up<int64_t>(Places(map).count, kWarps); }

template <class V>
unsigned channel_blocks(const Map& map) {
  return divide_up(map.dim, kWarp * kChannelsOf<V>);
}

template <class V>
struct Place {
  int64_t image_row;  // of the first row, counted over all images
  int row, rows, column;
  int channel;  // the first one, at most the last of the map
  bool has_channel;

  __device__ Place(const Map& map, const Places& places, int64_t index) {
    const int band = static_cast<int>(index / places.across % places.bands);
    row = band * places.rows;
    rows = min(places.rows, map.height - row);
    column = static_cast<int>(index % places.across) * kColumns;
    image_row = index / places.across / places.bands * map.height + row;
    const int own = (blockIdx.y * kWarp + threadIdx.x) * kChannelsOf<V>;
    has_channel = own < map.dim;
    channel = min(own, map.dim - kChannelsOf<V>);
  }

  // This place in maps whose tokens have a stride.
  template <class X>
  __device__ X* in(const Map& map, X* tokens, int64_t stride) const {
    return tokens + (image_row * map.width + column) * stride + channel;
  }
};

// Channels of a row i of a place, with kMargin columns on both sides; zero outside the map.
template <int kMargin, class V, class X>
__device__ __forceinline__ void load_row(const X* tokens, const Map& map, int64_t stride, const Place<V>& place, int i,
                                         V (&values)[kColumns + 2 * kMargin]) {
  const bool in_map = place.row + i >= 0 && place.row + i < map.height;
  const X* line = tokens + i * map.width * stride;
#pragma unroll
  for (int k = 0; k < kColumns + 2 * kMargin; ++k) {
    const int column = place.column + k - kMargin;
    const bool exists = in_map && column >= 0 && column < map.width;
    values[k] = exists ? load_raw<V>(line + (k - kMargin) * stride).value() : V(0.0f);
  }
}

// Move a row that will be loaded later to the L2 cache.
template <class V, class X>
__device__ __forceinline__ void prefetch_row(const X* tokens, const Map& map, int64_t stride, const Place<V>& place,
                                             int i) {
  const int k = min(static_cast<int>(threadIdx.x) % kColumns, map.width - 1 - place.column);
  if (place.row + i < map.height) prefetch_to_cache(tokens + (i * map.width + k) * stride);
}

template <class V, class X>
__device__ __forceinline__ void store_row(X* tokens, const Map& map, int64_t stride, const Place<V>& place, int i,
                                          const V (&values)[kColumns]) {
  X* line = tokens + i * map.width * stride;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if (place.has_channel && place.column + k < map.width) store_value(line + k * stride, values[k]);
  }
}

template <class V>
__device__ void load_taps(const DepthwiseConv& conv, int channel, V (&taps)[kConvTaps]) {
#pragma unroll
  for (int t = 0; t < kConvTaps; ++t) {
    const int tap = conv.mirrored ? kConvTaps - 1 - t : t;
    taps[t] = per_channel<V>(conv.weight + channel * kConvTaps + tap, kConvTaps);
  }
  if (conv.residual) taps[kConvTaps / 2] += 1.0f;
}

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
  load_taps(conv, place.channel, taps);
  const V bias = load_bias<V>(conv, place.channel);
  x = place.in(map, x, conv.stride);
  out = place.in(map, out, out_stride);
  V before[kColumns] = {}, here[kColumns] = {};  // sums of the last row and of this one, so far
#pragma unroll 2
  for (int i = -1; i <= place.rows; ++i) {
    V values[kColumns + 2], done[kColumns];
    load_row<1>(x, map, conv.stride, place, i, values);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      done[k] = add_row<6>(before[k], taps, values, k);
      before[k] = add_row<3>(here[k], taps, values, k);
      here[k] = add_row<0>(bias, taps, values, k);
      if constexpr (kSilu) done[k] = done[k] * each(sigmoid, done[k]);
    }
    if (i > 0) store_row(out, map, out_stride, place, i - 1, done);
  }
}

// sums (blocks, 10 dim): the gradients of the taps of all channels, (dim, 9), then of the biases.
template <class V, class T, bool kSilu>
__global__ void __launch_bounds__(kWarps* kWarp, 5)
    conv_gradients_kernel(const DepthwiseConv conv, const Places places, const T* x, const T* grad_out,
                          T* grad_convolved, float* sums_of_blocks) {
  const Map& map = conv.map;
  V taps[kConvTaps], sums[kConvTaps + 1] = {};
  const Place<V> first(map, places, 0);
  const int channel = first.channel;
  if constexpr (kSilu) load_taps(conv, channel, taps);
  const V bias = load_bias<V>(conv, channel);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; index < places.count; index += step) {
    const Place<V> place(map, places, index);
    const T* tokens = place.in(map, x, conv.stride);
    const T* of_out = place.in(map, grad_out, map.dim);
    V rows[3][kColumns + 2];
    load_row<1>(tokens, map, conv.stride, place, -1, rows[0]);
    load_row<1>(tokens, map, conv.stride, place, 0, rows[1]);
#pragma unroll 1
    for (int i = 0; i < place.rows; ++i) {
      V grads[kColumns];
      prefetch_row(of_out, map, map.dim, place, i + kRowsAhead);
      prefetch_row(tokens, map, conv.stride, place, i + 1 + kRowsAhead);
      load_row<0>(of_out, map, map.dim, place, i, grads);
      load_row<1>(tokens, map, conv.stride, place, i + 1, rows[2]);
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
      if constexpr (kSilu) store_row(place.in(map, grad_convolved, map.dim), map, map.dim, place, i, grads);
#pragma unroll
      for (int k = 0; k < kColumns + 2; ++k) {
        rows[0][k] = rows[1][k];
        rows[1][k] = rows[2][k];
      }
    }
  }

  V* of_warps = reinterpret_cast<V*>(shared_memory);  // (warps, taps and bias, lanes)
#pragma unroll
  for (int t = 0; t <= kConvTaps; ++t) of_warps[(threadIdx.y * (kConvTaps + 1) + t) * kWarp + threadIdx.x] = sums[t];
  __syncthreads();
  sums_of_blocks += static_cast<int64_t>(blockIdx.x) * (kConvTaps + 1) * map.dim;
  for (int t = threadIdx.y; t <= kConvTaps && first.has_channel; t += kWarps) {
    V sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[(warp * (kConvTaps + 1) + t) * kWarp + threadIdx.x];
    const int pitch = t < kConvTaps ? kConvTaps : 1;
    float* target = sums_of_blocks + (t < kConvTaps ? channel * kConvTaps + t : kConvTaps * map.dim + channel);
    if constexpr (kChannelsOf<V> == 1) {
      target[0] = sum;
    } else {
      target[0] = sum.x;
      target[pitch] = sum.y;
    }
  }
}

// Call body(V(), T*) with Pair for V if all tokens can be read in pairs of channels.
template <class Body>
void with_channels(const DepthwiseConv& conv, std::initializer_list<Activations> others, int64_t other_stride,
                   Body&& body) {
  with_type(conv.x, [&](auto* x) {
    constexpr size_t kBytes = 2 * sizeof(*x);
    bool paired = conv.map.dim % 2 == 0 && conv.stride % 2 == 0 && other_stride % 2 == 0;
    paired = paired && reinterpret_cast<uintptr_t>(x) % kBytes == 0;
    for (const Activations& other : others) paired = paired && reinterpret_cast<uintptr_t>(other.data) % kBytes == 0;
    paired ? body(Pair(), x) : body(0.0f, x);
  });
}

}  // namespace

void depthwise_conv(const DepthwiseConv& conv, Activations out, int64_t out_stride, cudaStream_t stream) {
  with_channels(conv, {out}, out_stride, [&](auto channels, auto* x) {
    using V = decltype(channels);
    using T = Element<decltype(x)>;
    const dim3 grid(static_cast<unsigned>(place_blocks(conv.map)), channel_blocks<V>(conv.map));
    launch("depthwise_conv", conv.silu ? convolve_kernel<V, T, true> : convolve_kernel<V, T, false>, grid,
           dim3(kWarp, kWarps), 0, stream, conv, Places(conv.map), x, static_cast<T*>(out.data), out_stride);
  });
}

int depthwise_conv_partial_sums(const Map& map) {
  const int64_t most = divide_up<int64_t>(kGradientBlocks, channel_blocks<Pair>(map));
  return static_cast<int>(std::min(most, place_blocks(map)));
}

void depthwise_conv_gradients(const DepthwiseConv& conv, Activations grad_out, Activations grad_convolved, float* sums,
                              cudaStream_t stream) {
  with_channels(conv, {grad_out, grad_convolved}, conv.map.dim, [&](auto channels, auto* x) {
    using V = decltype(channels);
    using T = Element<decltype(x)>;
    const dim3 grid(depthwise_conv_partial_sums(conv.map), channel_blocks<V>(conv.map));
    const auto kernel = conv.silu ? conv_gradients_kernel<V, T, true> : conv_gradients_kernel<V, T, false>;
    launch("depthwise_conv_gradients", kernel, grid, dim3(kWarp, kWarps),
           kWarps * (kConvTaps + 1) * kWarp * kChannelsOf<V>, stream, conv, Places(conv.map), x,
           static_cast<const T*>(grad_out.data), static_cast<T*>(grad_convolved.data), sums);
  });
}

}  // namespace spatial_mamba
