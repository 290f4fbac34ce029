// Depthwise 3x3 convolution with zero padding, its adjoint, and the gradients of its weights. A thread moves down two
// columns of one or two channels, so that it reads each row once.
#include <algorithm>

#include "channels.cuh"

namespace spatial_mamba {
namespace {

constexpr int kConvTaps = 9, kColumns = 2, kMostRows = 14;  // of a thread
constexpr int kWarps = 4;                                    // of a block, which have different places
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
};

// The columns of a place, with kMargin more on both sides, in one row after another. Those outside the map are zero.
template <int kMargin, class V, class X>
class Columns {
 public:
  static constexpr int kCount = kColumns + 2 * kMargin;
  using Row = Raw<V, std::remove_const_t<X>>[kCount];

  // Starts in row i of the place, of maps whose tokens have a stride.
  __device__ Columns(const Map& map, X* tokens, int64_t stride, const Place<V>& place, int i)
      : row_(tokens + ((place.image_row + i) * map.width + place.column - kMargin) * stride + place.channel),
        pitch_(map.width * stride),
        step_(static_cast<unsigned>(stride * sizeof(X))) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int column = place.column + k - kMargin;
      exists_[k] = column >= 0 && column < map.width;
    }
  }

  // Load a row, or zeros if it is outside the map; then move to the next one.
  __device__ __forceinline__ void load(bool in_map, Row& values) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = {};
      if (in_map && exists_[k]) values[k] = load_raw<V>(at_byte(row_, k * step_));
    }
    row_ += pitch_;
  }

  // Store a row, then move to the next one.
  __device__ __forceinline__ void store(bool has_channel, const V (&values)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (has_channel && exists_[k]) store_value(at_byte(row_, k * step_), values[k]);
    }
    row_ += pitch_;
  }

 private:
  X* row_;
  int64_t pitch_;
  unsigned step_;  // bytes
  bool exists_[kCount];
};

template <class V, class X, int kCount>
__device__ __forceinline__ void values_of(const Raw<V, X> (&row)[kCount], V (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = row[k].value();
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
  Columns<1, V, const T> source(map, x, conv.stride, place, -1);
  Columns<0, V, T> target(map, out, out_stride, place, 0);
  const int end = min(place.rows + 1, map.height - place.row);  // of the rows to load
  typename Columns<1, V, const T>::Row loaded;
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
    Columns<1, V, const T> source(map, x, conv.stride, place, -1);
    Columns<0, V, const T> of_out(map, grad_out, map.dim, place, 0);
    Columns<0, V, T> target(map, grad_convolved, map.dim, place, 0);
    const int end = min(place.rows + 1, map.height - place.row);  // of the rows to load
    typename Columns<1, V, const T>::Row loaded;
    typename Columns<0, V, const T>::Row loaded_grads;
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
