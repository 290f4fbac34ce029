// Places of depthwise convolutions: a thread moves down a few columns of one or two channels, so that it reads each row
// once. It loads the next row while it uses one.
#pragma once

#include <algorithm>

#include "channels.cuh"

namespace spatial_mamba {

constexpr int kConvTaps = 9, kColumns = 2, kMostRows = 14;  // of a thread
constexpr int kWarps = 4;                                    // of a block, which have different places

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

inline int64_t place_blocks(const Map& map) { return divide_up<int64_t>(Places(map).count, kWarps); }

template <class V>
unsigned channel_blocks(const Map& map) {
  return divide_up(map.dim, kWarp * kChannelsOf<V>);
}

// Blocks that leave partial sums, each with several places: as many as the GPU has at once.
inline int gradient_blocks(const Map& map, int per_multiprocessor) {
  const int at_once = per_multiprocessor * attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = divide_up<int64_t>(at_once, channel_blocks<Pair>(map));
  return static_cast<int>(std::min(most, place_blocks(map)));
}

template <class V>
struct Place {
  int64_t image;
  int row, rows, column;
  int channel;  // the first one, at most the last of the map
  bool has_channel;

  __device__ Place(const Map& map, const Places& places, int64_t index) {
    image = index / places.across / places.bands;
    row = static_cast<int>(index / places.across % places.bands) * places.rows;
    rows = min(places.rows, map.height - row);
    column = static_cast<int>(index % places.across) * kColumns;
    const int own = (blockIdx.y * kWarp + threadIdx.x) * kChannelsOf<V>;
    has_channel = own < map.dim;
    channel = min(own, map.dim - kChannelsOf<V>);
  }
};

// Neighbouring columns of a map, in one row after another. Those outside the map are zero.
template <int kCount, class V, class X>
class Columns {
 public:
  using Row = Raw<V, std::remove_const_t<X>>[kCount];

  // Starts at a row and column, which may be outside the map; tokens are `stride` elements apart.
  __device__ Columns(const Map& map, X* tokens, int64_t stride, int64_t image, int row, int column, int channel)
      : row_(tokens + ((image * map.height + row) * map.width + column) * stride + channel),
        pitch_(map.width * stride),
        step_(static_cast<unsigned>(stride * sizeof(X))) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) exists_[k] = column + k >= 0 && column + k < map.width;
  }

  __device__ bool has(int k) const { return exists_[k]; }

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
__device__ void load_taps(const float* weight, int channel, V (&taps)[kConvTaps], bool mirrored = false) {
#pragma unroll
  for (int t = 0; t < kConvTaps; ++t) {
    taps[t] = per_channel<V>(weight + channel * kConvTaps + (mirrored ? kConvTaps - 1 - t : t), kConvTaps);
  }
}

// Sum over the block and write: first the sums of the taps, (dim, 9), then each further sum, (dim,).
template <class V, int kSums>
__device__ __forceinline__ void store_sums(const V (&sums)[kSums], int channel, bool has_channel, int dim,
                                           float* sums_of_blocks) {
  V* of_warps = reinterpret_cast<V*>(shared_memory);  // (warps, sums, lanes)
#pragma unroll
  for (int t = 0; t < kSums; ++t) of_warps[(threadIdx.y * kSums + t) * kWarp + threadIdx.x] = sums[t];
  __syncthreads();
  sums_of_blocks += static_cast<int64_t>(blockIdx.x) * kSums * dim;
  for (int t = threadIdx.y; t < kSums && has_channel; t += kWarps) {
    V sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[(warp * kSums + t) * kWarp + threadIdx.x];
    const int pitch = t < kConvTaps ? kConvTaps : 1;
    float* target = sums_of_blocks + (t < kConvTaps ? channel * kConvTaps + t : t * dim + channel);
    if constexpr (kChannelsOf<V> == 1) {
      target[0] = sum;
    } else {
      target[0] = sum.x;
      target[pitch] = sum.y;
    }
  }
}

template <class V>
size_t shared_floats_of_sums(int count) {
  return static_cast<size_t>(kWarps) * count * kWarp * kChannelsOf<V>;
}

// Call body(V(), T*) with the typed tokens, and with Pair for V if they can be read in pairs of channels.
template <class Body>
void with_channels(Activations tokens, bool paired, Body&& body) {
  with_type(tokens, [&](auto* typed) { paired ? body(Pair(), typed) : body(0.0f, typed); });
}

}  // namespace spatial_mamba
