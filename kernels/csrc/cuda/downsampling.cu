// ReLU, depthwise 3x3 convolution of stride 2 with zero padding and ReLU, and the gradients. A thread moves down two
// columns of the result.
#include "conv_places.cuh"

namespace spatial_mamba {
namespace {

constexpr int kGradientBlocks = 4;      // per multiprocessor
constexpr int kInputs = 2 * kColumns;  // columns of the hidden layer per place

template <class V>
__device__ V rectified(V value) {
  return each([](float x) { return x < 0.0f ? 0.0f : x; }, value);  // NaN stays NaN
}

// The gradient through the ReLU whose result is `value`.
__device__ inline float through_relu(float value, float gradient) { return value <= 0.0f ? 0.0f : gradient; }
__device__ inline Pair through_relu(Pair value, Pair gradient) {
  return {through_relu(value.x, gradient.x), through_relu(value.y, gradient.y)};
}

template <class V, class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    downsample_kernel(const Downsampling layer, const Places places, const T* hidden, const T* hidden_bias,
                      T* sampled) {
  const Map& map = layer.map;
  const Map halved = layer.halved();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= places.count) return;
  const Place<V> place(halved, places, index);
  V taps[kConvTaps];
  load_taps(layer.weight, place.channel, taps);
  const V bias = per_channel<V>(layer.bias + place.channel);
  const V of_hidden = load_raw<V>(hidden_bias + place.channel).value();
  using Source = Columns<kInputs + 1, V, const T>;
  Source source(map, hidden, map.dim, place.image, 2 * place.row - 1, 2 * place.column - 1, place.channel);
  Columns<kColumns, V, T> target(halved, sampled, map.dim, place.image, place.row, place.column, place.channel);
  int row = 2 * place.row - 1;  // the next one to load
  const auto load = [&](typename Source::Row& loaded) {
    source.load(row >= 0 && row < map.height, loaded);
    ++row;
  };
  typename Source::Row loaded[2];
  V above[kInputs + 1];  // after the ReLU
  // Zeros outside the map stay zeros.
  const auto activate = [&](const typename Source::Row& loaded, int row, V (&values)[kInputs + 1]) {
#pragma unroll
    for (int k = 0; k <= kInputs; ++k) {
      const bool exists = row >= 0 && row < map.height && source.has(k);
      values[k] = exists ? rectified(loaded[k].value() + of_hidden) : V(0.0f);
    }
  };
  load(loaded[0]);
  activate(loaded[0], row - 1, above);
  load(loaded[0]);
  load(loaded[1]);
#pragma unroll 1
  for (int i = 0; i < place.rows; ++i) {
    V here[kInputs + 1], below[kInputs + 1], done[kColumns];
    activate(loaded[0], row - 2, here);
    activate(loaded[1], row - 1, below);
    if (i + 1 < place.rows) {  // the next rows, while these are used
      load(loaded[0]);
      load(loaded[1]);
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      V sum = bias;
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        sum += taps[t] * above[2 * k + t];
        sum += taps[3 + t] * here[2 * k + t];
        sum += taps[6 + t] * below[2 * k + t];
      }
      done[k] = rectified(sum);
    }
    target.store(place.has_channel, done);
#pragma unroll
    for (int k = 0; k <= kInputs; ++k) above[k] = below[k];
  }
}

// A thread owns, per token of the result, 2x2 tokens of the hidden layer, each read by up to four tokens of the result.
// sums (blocks, 11 dim): the gradients of the taps of all channels, (dim, 9), of the bias, and of the hidden bias.
template <class V, class T>
__global__ void __launch_bounds__(kWarps* kWarp, kGradientBlocks)
    downsample_gradients_kernel(const Downsampling layer, const Places places, T* hidden, const T* hidden_bias,
                                const T* sampled, const T* grad_sampled, float* sums_of_blocks) {
  const Map& map = layer.map;
  const Map halved = layer.halved();
  const Place<V> first(halved, places, 0);
  const int channel = first.channel;
  V taps[kConvTaps], sums[kConvTaps + 2] = {};
  V& sum_bias = sums[kConvTaps];
  V& sum_hidden_bias = sums[kConvTaps + 1];
  load_taps(layer.weight, channel, taps);
  const V of_hidden = load_raw<V>(hidden_bias + channel).value();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; index < places.count; index += step) {
    const Place<V> place(halved, places, index);
    using Results = Columns<kColumns + 1, V, const T>;
    Results of_results(halved, sampled, map.dim, place.image, place.row, place.column, channel);
    Results of_grads(halved, grad_sampled, map.dim, place.image, place.row, place.column, channel);
    Columns<kInputs, V, T> source(map, hidden, map.dim, place.image, 2 * place.row, 2 * place.column, channel);
    Columns<kInputs, V, T> target = source;
    // The gradients before the ReLU of row i of the results.
    const auto load_grads = [&](int i, V (&grads)[kColumns + 1]) {
      typename Results::Row results, loaded;
      const bool in_map = place.row + i < halved.height;
      of_results.load(in_map, results);
      of_grads.load(in_map, loaded);
#pragma unroll
      for (int k = 0; k <= kColumns; ++k) grads[k] = through_relu(results[k].value(), loaded[k].value());
    };
    typename Columns<kInputs, V, T>::Row loaded[2];
    const auto load_inputs = [&](int row) {
      source.load(true, loaded[0]);
      source.load(row + 1 < map.height, loaded[1]);
    };
    V grads[2][kColumns + 1];  // of this row of the results and of the next one
    load_grads(0, grads[0]);
    load_inputs(2 * place.row);
#pragma unroll 1
    for (int i = 0; i < place.rows; ++i) {
      const int row = 2 * (place.row + i);
      V values[2][kInputs], of_inputs[2][kInputs] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          const bool exists = row + r < map.height && source.has(k);
          values[r][k] = exists ? rectified(loaded[r][k].value() + of_hidden) : V(0.0f);
        }
      }
      load_grads(i + 1, grads[1]);
      if (i + 1 < place.rows) load_inputs(row + 2);  // the next rows, while these are used
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          // Result (i + a, k / 2 + b) reads this input with tap (r + 1 - 2 a, k % 2 + 1 - 2 b).
#pragma unroll
          for (int a = 0; a <= r; ++a) {
#pragma unroll
            for (int b = 0; b <= k % 2; ++b) {
              const int t = 3 * (r + 1 - 2 * a) + k % 2 + 1 - 2 * b;
              const V grad = grads[a][k / 2 + b];
              of_inputs[r][k] += taps[t] * grad;
              sums[t] += values[r][k] * grad;
            }
          }
          of_inputs[r][k] = through_relu(values[r][k], of_inputs[r][k]);
          sum_hidden_bias += of_inputs[r][k];
        }
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sum_bias += grads[0][k];
      target.store(place.has_channel, of_inputs[0]);
      target.store(place.has_channel && row + 1 < map.height, of_inputs[1]);
#pragma unroll
      for (int k = 0; k <= kColumns; ++k) grads[0][k] = grads[1][k];
    }
  }
  store_sums(sums, channel, first.has_channel, map.dim, sums_of_blocks);
}

}  // namespace

void downsample(const Downsampling& layer, Activations sampled, cudaStream_t stream) {
  const Map halved = layer.halved();
  const bool paired = are_aligned(2, {layer.map.dim}, {layer.hidden, layer.hidden_bias, sampled});
  with_channels(layer.hidden, paired, [&](auto channels, auto* hidden) {
    using V = decltype(channels);
    using T = Element<decltype(hidden)>;
    const dim3 grid(static_cast<unsigned>(place_blocks(halved)), channel_blocks<V>(halved));
    launch("downsample", downsample_kernel<V, T>, grid, dim3(kWarp, kWarps), 0, stream, layer, Places(halved), hidden,
           static_cast<const T*>(layer.hidden_bias.data), static_cast<T*>(sampled.data));
  });
}

int downsample_partial_sums(const Downsampling& layer) { return gradient_blocks(layer.halved(), kGradientBlocks); }

void downsample_gradients(const Downsampling& layer, Activations sampled, Activations grad_sampled, float* sums,
                          cudaStream_t stream) {
  const Map halved = layer.halved();
  const bool paired = are_aligned(2, {layer.map.dim}, {layer.hidden, layer.hidden_bias, sampled, grad_sampled});
  with_channels(layer.hidden, paired, [&](auto channels, auto* hidden) {
    using V = decltype(channels);
    using T = Element<decltype(hidden)>;
    const dim3 grid(downsample_partial_sums(layer), channel_blocks<V>(halved));
    launch("downsample_gradients", downsample_gradients_kernel<V, T>, grid, dim3(kWarp, kWarps),
           shared_floats_of_sums<V>(kConvTaps + 2), stream, layer, Places(halved), hidden,
           static_cast<const T*>(layer.hidden_bias.data), static_cast<const T*>(sampled.data),
           static_cast<const T*>(grad_sampled.data), sums);
  });
}

}  // namespace spatial_mamba
