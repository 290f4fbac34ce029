// The channels of a thread: V is float for one channel, or Pair for two neighbouring ones.
#pragma once

#include <cstring>

#include "stencil.cuh"

namespace spatial_mamba {

struct alignas(8) Pair {
  float x, y;

  __device__ Pair(float value = 0.0f) : x(value), y(value) {}
  __device__ Pair(float x, float y) : x(x), y(y) {}
  __device__ friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
  __device__ friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
  __device__ Pair& operator+=(Pair other) { return *this = *this + other; }
};

template <class V>
constexpr int kChannelsOf = sizeof(V) / sizeof(float);
template <class V>
constexpr int kLanes = kChannels / kChannelsOf<V>;  // that have the same tokens

template <class Function>
__device__ inline float each(const Function& function, float value) {
  return function(value);
}
template <class Function>
__device__ inline Pair each(const Function& function, Pair value) {
  return {function(value.x), function(value.y)};
}

__device__ inline float sum_of(float value) { return value; }
__device__ inline float sum_of(Pair value) { return value.x + value.y; }

// A value per channel of a thread, `pitch` floats apart.
template <class V>
__device__ inline V per_channel(const float* values, int pitch = 1) {
  if constexpr (kChannelsOf<V> == 1) {
    return values[0];
  } else {
    return {values[0], values[pitch]};
  }
}

// Values as they are in memory. After `settle`, the compiler does not convert them, and so wait for them, any earlier.
template <class V, class X>
struct alignas(kChannelsOf<V> * sizeof(X)) Raw {
  X channels[kChannelsOf<V>];

  __device__ V value() const {
    if constexpr (kChannelsOf<V> == 1) {
      return load(channels);
    } else if constexpr (std::is_same_v<X, __nv_bfloat16>) {  // in two instructions instead of three
      unsigned word;
      memcpy(&word, channels, sizeof(word));
      const unsigned low = word << 16, high = word & 0xffff0000u;
      V both;
      memcpy(&both.x, &low, sizeof(low));
      memcpy(&both.y, &high, sizeof(high));
      return both;
    } else {
      return {load(channels), load(channels + 1)};
    }
  }

  __device__ void settle() {
    if constexpr (sizeof(Raw) % sizeof(unsigned) == 0) {
      unsigned words[sizeof(Raw) / sizeof(unsigned)];
      memcpy(words, channels, sizeof(Raw));
#pragma unroll
      for (unsigned& word : words) spatial_mamba::settle(word);
      memcpy(channels, words, sizeof(Raw));
    }
  }
};

template <class V, class X>
__device__ inline Raw<V, X> load_raw(const X* source) {
  return *reinterpret_cast<const Raw<V, X>*>(source);
}

template <class X>
__device__ inline void store_value(X* target, float value) {
  store(target, value);
}
template <class X>
__device__ inline void store_value(X* target, Pair value) {
  Raw<Pair, X> raw;
  store(raw.channels, value.x);
  store(raw.channels + 1, value.y);
  *reinterpret_cast<Raw<Pair, X>*>(target) = raw;
}

__device__ inline void settle(Pair& value) {
  settle(value.x);
  settle(value.y);
}

// The value of the lane that is `distance` lower, or higher if it is negative.
__device__ inline float shift(float value, int distance) {
  return distance > 0 ? __shfl_up_sync(kAllLanes, value, distance) : __shfl_down_sync(kAllLanes, value, -distance);
}
__device__ inline Pair shift(Pair value, int distance) {
  return {shift(value.x, distance), shift(value.y, distance)};
}
template <class V>
__device__ inline AffineMap<V> shift(AffineMap<V> map, int distance) {
  return {shift(map.decay, distance), shift(map.input, distance)};
}

}  // namespace spatial_mamba
