// The channels that a thread reads and writes at once, from one token after another.
#pragma once

#include "channels.cuh"

namespace spatial_mamba {

// The channels of a thread as they are in memory.
template <class X>
struct alignas(kVectorChannels * sizeof(X)) ChannelVector {
  Raw<Pair, X> pairs[kVectorChannels / 2] = {};

  __device__ __forceinline__ void values(float (&all)[kVectorChannels]) const {
#pragma unroll
    for (int j = 0; j < kVectorChannels; j += 2) {
      const Pair pair = pairs[j / 2].value();
      all[j] = pair.x;
      all[j + 1] = pair.y;
    }
  }
};

// Where a thread's channels are in each token: from `first` on. With kFull, all threads have kVectorChannels,
// and can read and write them at once; this saves instructions.
template <bool kFull>
struct ChannelPlace {
  int first, dim;
  bool aligned;  // whether they can be read and written at once

  __device__ bool has(int j) const { return kFull || first + j < dim; }

  // Channels beyond the last one are zero.
  template <class X>
  __device__ __forceinline__ ChannelVector<X> load(const X* token) const {
    ChannelVector<X> vector;
    if (kFull || aligned) {
      if (has(0)) vector = *reinterpret_cast<const ChannelVector<X>*>(token + first);
    } else {
#pragma unroll
      for (int j = 0; j < kVectorChannels; ++j) {
        if (has(j)) vector.pairs[j / 2].channels[j % 2] = token[first + j];
      }
    }
    return vector;
  }

  // Move a token that will be read later to the L2 cache.
  template <class X>
  __device__ __forceinline__ void prefetch(const X* token) const {
    if (has(0)) prefetch_to_cache(token + first);
  }

  template <class X>
  __device__ __forceinline__ void write(X* token, const float (&values)[kVectorChannels]) const {
    if (kFull || aligned) {
      ChannelVector<X> vector;
#pragma unroll
      for (int j = 0; j < kVectorChannels; ++j) store(vector.pairs[j / 2].channels + j % 2, values[j]);
      if (has(0)) *reinterpret_cast<ChannelVector<X>*>(token + first) = vector;
    } else {
#pragma unroll
      for (int j = 0; j < kVectorChannels; ++j) {
        if (has(j)) store(token + first + j, values[j]);
      }
    }
  }
};

}  // namespace spatial_mamba
