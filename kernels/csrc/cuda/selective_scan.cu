// The selective scan in mamba_ssm's layout, tokens contiguous. A block loops over one sequence in chunks of tokens, a
// few neighbouring tokens per thread, and in each chunk over the states.
#include <algorithm>

#include "channels.cuh"

namespace spatial_mamba {
namespace {

constexpr int kItems = kScanItems;
constexpr int kWarps = kScanThreads / kWarp;

// The tokens of one thread in a chunk.
struct Items {
  int64_t first;
  int count;

  __device__ Items(int64_t chunk, int64_t length) : first(chunk * kScanChunk + threadIdx.x * kItems) {
    const int64_t left = length - first;
    count = static_cast<int>(left < 0 ? 0 : (left < kItems ? left : kItems));
  }

  // Values at these tokens, zero after the end of the sequence.
  template <class T>
  __device__ void load_from(const T* sequence, float (&values)[kItems]) const {
    if (is_vector(sequence)) {
      const auto vector = *reinterpret_cast<const Vector<T>*>(sequence + first);
#pragma unroll
      for (int k = 0; k < kItems; ++k) values[k] = load(vector.values + k);
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) values[k] = k < count ? load(sequence + first + k) : 0.0f;
    }
  }

  template <class T>
  __device__ void store_to(T* sequence, const float (&values)[kItems]) const {
    if (is_vector(sequence)) {
      Vector<T> vector;
#pragma unroll
      for (int k = 0; k < kItems; ++k) store(vector.values + k, values[k]);
      *reinterpret_cast<Vector<T>*>(sequence + first) = vector;
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (k < count) store(sequence + first + k, values[k]);
      }
    }
  }

 private:
  // All items in one memory access.
  template <class T>
  struct alignas(kItems * sizeof(T)) Vector {
    T values[kItems];
  };

  template <class T>
  __device__ bool is_vector(const T* sequence) const {
    return count == kItems && reinterpret_cast<uintptr_t>(sequence + first) % sizeof(Vector<T>) == 0;
  }
};

// The map of the threads before this one (with kReverse after it) and, in `all`, of the whole block. `totals` has
// (2, kWarps) maps; calls alternate between its halves, so that one barrier per call is enough.
template <bool kReverse>
__device__ Affine scan_block(Affine own, Affine* totals, int& half, Affine& all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int rank = kReverse ? kWarp - 1 - lane : lane;
  constexpr int kStep = kReverse ? -1 : 1;
  Affine inclusive = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Affine earlier = shift(inclusive, kStep * distance);
    if (rank >= distance) inclusive = earlier.then(inclusive);
  }
  Affine exclusive = shift(inclusive, kStep);
  if (rank == 0) exclusive = Affine();

  Affine* warps = totals + half * kWarps;
  half = 1 - half;
  if (rank == kWarp - 1) warps[warp] = inclusive;
  __syncthreads();
  Affine before;
  all = Affine();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const int other = kReverse ? kWarps - 1 - i : i;
    if (other == warp) before = all;
    all = all.then(warps[other]);
  }
  return before.then(exclusive);
}

// The sequences of one batch element and channel.
template <class T>
struct Channel {
  int64_t index;  // counted over the batch
  int channel;
  const T *u, *delta, *B, *C, *z;

  __device__ Channel(const SelectiveScan& scan, int64_t index) : index(index) {
    const int64_t sequence = index * scan.length;
    channel = static_cast<int>(index % scan.dim);
    const int64_t group = index / scan.dim * scan.groups + channel / (scan.dim / scan.groups);
    const int64_t matrices = group * scan.states * scan.length;
    u = static_cast<const T*>(scan.u) + sequence;
    delta = static_cast<const T*>(scan.delta) + sequence;
    B = static_cast<const T*>(scan.B) + matrices;
    C = scan.C == nullptr ? nullptr : static_cast<const T*>(scan.C) + matrices;
    z = scan.z == nullptr ? nullptr : static_cast<const T*>(scan.z) + sequence;
  }

  // The deltas, zero after the end so that the state does not change, and their derivatives with respect to the input.
  __device__ void load_delta(const SelectiveScan& scan, const Items& items, float (&steps)[kItems],
                             float (&derivatives)[kItems]) const {
    const float bias = scan.delta_bias == nullptr ? 0.0f : scan.delta_bias[channel];
    items.load_from(delta, steps);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const float x = steps[k] + bias;
      derivatives[k] = scan.delta_softplus ? sigmoid(x) : 1.0f;
      steps[k] = k < items.count ? (scan.delta_softplus ? softplus(x) : x) : 0.0f;
    }
  }
};

// The map of one thread's steps for one state; also sets `decays` and `inputs`.
__device__ inline Affine compose(const float (&delta)[kItems], const float (&u)[kItems], const float (&B)[kItems],
                                 float rate, float (&decays)[kItems], float (&inputs)[kItems]) {
  Affine own;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    decays[k] = fast_exp(delta[k] * rate);
    inputs[k] = delta[k] * B[k] * u[k];
    own = own.then({decays[k], inputs[k]});
  }
  return own;
}

// The carries of all states between chunks, twice: a chunk reads one half and writes the other.
struct Carries {
  float* values;  // (2, count)
  int count;

  __device__ void clear() const {
    for (int i = threadIdx.x; i < 2 * count; i += kScanThreads) values[i] = 0.0f;
  }
  __device__ float& into(int64_t chunk, int i) const { return values[(chunk & 1) * count + i]; }
  __device__ float& out_of(int64_t chunk, int i) const { return values[(~chunk & 1) * count + i]; }
};

// One block per channel of the batch. Writes outputs to `out`, or states if C is null; or, with kChunkStates, only the
// states before each chunk.
template <class T, bool kChunkStates>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_kernel(const __grid_constant__ SelectiveScan scan, void* out, float* last_state,
                          float* chunk_states) {
  float* memory = shared_memory;
  Affine* totals = reinterpret_cast<Affine*>(take(memory, 2 * 2 * kWarps));
  const Carries carries{take(memory, 2 * scan.states), scan.states};
  carries.clear();
  __syncthreads();
  const Channel<T> own(scan, blockIdx.x);
  const int64_t chunks = divide_up<int64_t>(scan.length, kScanChunk);
  int half = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Items items(chunk, scan.length);
    float u[kItems], delta[kItems], unused[kItems], y[kItems];
    items.load_from(own.u, u);
    own.load_delta(scan, items, delta, unused);
    const float skip = scan.D == nullptr ? 0.0f : scan.D[own.channel];
#pragma unroll
    for (int k = 0; k < kItems; ++k) y[k] = skip * u[k];

    for (int n = 0; n < scan.states; ++n) {
      const int64_t of_state = n * scan.length;
      float B[kItems], decays[kItems], inputs[kItems], h[kItems];
      items.load_from(own.B + of_state, B);
      const Affine steps = compose(delta, u, B, scan.A[own.channel * scan.states + n], decays, inputs);
      Affine all;
      const Affine before = scan_block<false>(steps, totals, half, all);
      const float carry = carries.into(chunk, n);
      if (threadIdx.x == 0) {
        carries.out_of(chunk, n) = all(carry);
        if (kChunkStates) chunk_states[(own.index * chunks + chunk) * scan.states + n] = carry;
        if (!kChunkStates && chunk == chunks - 1) last_state[own.index * scan.states + n] = all(carry);
      }
      if (kChunkStates) continue;

      float state = before(carry);
#pragma unroll
      for (int k = 0; k < kItems; ++k) h[k] = state = decays[k] * state + inputs[k];
      if (own.C == nullptr) {
        items.store_to(static_cast<float*>(out) + (own.index * scan.states + n) * scan.length, h);
      } else {
        float C[kItems];
        items.load_from(own.C + of_state, C);
#pragma unroll
        for (int k = 0; k < kItems; ++k) y[k] += C[k] * h[k];
      }
    }

    if (kChunkStates || own.C == nullptr) continue;
    if (own.z != nullptr) {
      float z[kItems];
      items.load_from(own.z, z);
#pragma unroll
      for (int k = 0; k < kItems; ++k) y[k] *= z[k] * sigmoid(z[k]);
    }
    items.store_to(static_cast<T*>(out) + own.index * scan.length, y);
  }
}

// Sums over all chunks, per channel, warp and value: each warp adds to its own place, always in the same order.
struct WarpSums {
  float* values;  // (channels, kWarps, count)
  int count;

  __device__ void clear(int channels) const {
    for (int i = threadIdx.x; i < channels * kWarps * count; i += kScanThreads) values[i] = 0.0f;
  }
  __device__ void add(int channel, int i, float value) const {
    const float sum = warp_sum(value);
    if (threadIdx.x % kWarp == 0) values[(channel * kWarps + threadIdx.x / kWarp) * count + i] += sum;
  }
  __device__ float total(int channel, int i) const {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += values[(channel * kWarps + warp) * count + i];
    return sum;
  }
};

// One block per `channels` neighbouring channels of a group, over which it sums the gradients of B and C. Going
// backwards, the carry from token to token is decay (grad_h + carry).
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_backward_kernel(const __grid_constant__ SelectiveScan scan, const void* grad_out,
                                   const float* grad_last, const float* chunk_states,
                                   const __grid_constant__ SelectiveScanGradients gradients, int channels) {
  const int states = scan.states, of_D = states, of_bias = states + 1;
  float* memory = shared_memory;
  Affine* totals = reinterpret_cast<Affine*>(take(memory, 2 * 2 * kWarps));
  const Carries carries{take(memory, 2 * channels * states), channels * states};
  const WarpSums sums{take(memory, channels * kWarps * (states + 2)), states + 2};
  const int64_t chunks = divide_up<int64_t>(scan.length, kScanChunk);
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * channels;
  sums.clear(channels);
  for (int i = threadIdx.x; i < channels * states; i += kScanThreads) {
    carries.into(chunks - 1, i) = grad_last[first_channel * states + i];
  }
  __syncthreads();

  int half = 0;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Items items(chunk, scan.length);
    for (int c = 0; c < channels; ++c) {
      const Channel<T> own(scan, first_channel + c);
      const int64_t sequence = own.index * scan.length;
      float u[kItems], delta[kItems], delta_derivatives[kItems], grad_y[kItems] = {}, gate_derivatives[kItems] = {};
      items.load_from(own.u, u);
      own.load_delta(scan, items, delta, delta_derivatives);
      if (own.C != nullptr) items.load_from(static_cast<const T*>(grad_out) + sequence, grad_y);
      if (own.z != nullptr) {
        float z[kItems];
        items.load_from(own.z, z);
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          const float gate = sigmoid(z[k]);
          gate_derivatives[k] = grad_y[k] * gate * (1.0f + z[k] * (1.0f - gate));
          grad_y[k] *= z[k] * gate;
        }
      }
      const float skip = scan.D == nullptr ? 0.0f : scan.D[own.channel];
      float y[kItems], grad_u[kItems], grad_delta[kItems] = {}, sum_D = 0.0f;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        y[k] = skip * u[k];
        grad_u[k] = skip * grad_y[k];
        sum_D += grad_y[k] * u[k];
      }

      for (int n = 0; n < states; ++n) {
        const float rate = scan.A[own.channel * states + n];
        const int64_t of_state = n * scan.length;
        float B[kItems], C[kItems] = {}, decays[kItems], inputs[kItems], h_before[kItems], h[kItems], grad_h[kItems];
        items.load_from(own.B + of_state, B);
        Affine all;
        const Affine steps = compose(delta, u, B, rate, decays, inputs);
        float state =
            scan_block<false>(steps, totals, half, all)(chunk_states[(own.index * chunks + chunk) * states + n]);
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          h_before[k] = state;
          h[k] = state = decays[k] * state + inputs[k];
        }
        if (own.C != nullptr) {
          items.load_from(own.C + of_state, C);
#pragma unroll
          for (int k = 0; k < kItems; ++k) grad_h[k] = C[k] * grad_y[k];
        } else {
          items.load_from(static_cast<const float*>(grad_out) + (own.index * states + n) * scan.length, grad_h);
        }
        Affine backwards;
#pragma unroll
        for (int k = kItems - 1; k >= 0; --k) backwards = backwards.then({decays[k], decays[k] * grad_h[k]});
        const Affine behind = scan_block<true>(backwards, totals, half, all);
        float carry = behind(carries.into(chunk, c * states + n));
        if (threadIdx.x == 0) carries.out_of(chunk, c * states + n) = all(carries.into(chunk, c * states + n));

        float grad_B[kItems], grad_C[kItems], sum_A = 0.0f;
#pragma unroll
        for (int k = kItems - 1; k >= 0; --k) {
          const float grad_state = grad_h[k] + carry;
          carry = decays[k] * grad_state;
          const float grad_exponent = carry * h_before[k];
          sum_A += grad_exponent * delta[k];
          grad_delta[k] += grad_exponent * rate + grad_state * B[k] * u[k];
          grad_u[k] += grad_state * delta[k] * B[k];
          grad_B[k] = grad_state * delta[k] * u[k];
          grad_C[k] = grad_y[k] * h[k];
          y[k] += C[k] * h[k];
        }
        sums.add(c, n, sum_A);
        const int64_t partial = (blockIdx.x * static_cast<int64_t>(states) + n) * scan.length;
        if (c > 0) {  // this thread's values of the previous channels
          float earlier[kItems];
          items.load_from(gradients.B + partial, earlier);
#pragma unroll
          for (int k = 0; k < kItems; ++k) grad_B[k] += earlier[k];
          if (own.C != nullptr) {
            items.load_from(gradients.C + partial, earlier);
#pragma unroll
            for (int k = 0; k < kItems; ++k) grad_C[k] += earlier[k];
          }
        }
        items.store_to(gradients.B + partial, grad_B);
        if (own.C != nullptr) items.store_to(gradients.C + partial, grad_C);
      }

      float sum_bias = 0.0f;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        grad_delta[k] *= delta_derivatives[k];
        sum_bias += k < items.count ? grad_delta[k] : 0.0f;
        gate_derivatives[k] *= y[k];
      }
      items.store_to(static_cast<T*>(gradients.u) + sequence, grad_u);
      items.store_to(static_cast<T*>(gradients.delta) + sequence, grad_delta);
      if (own.z != nullptr) items.store_to(static_cast<T*>(gradients.z) + sequence, gate_derivatives);
      sums.add(c, of_D, sum_D);
      sums.add(c, of_bias, sum_bias);
    }
  }

  __syncthreads();
  for (int i = threadIdx.x; i < channels * (states + 2); i += kScanThreads) {
    const int c = i / (states + 2), n = i % (states + 2);
    const int64_t channel = first_channel + c;
    const float sum = sums.total(c, n);
    if (n < states) {
      gradients.A[channel * states + n] = sum;
    } else {
      (n == of_D ? gradients.D : gradients.delta_bias)[channel] = sum;
    }
  }
}

size_t backward_shared_floats(int channels, int states) {
  return 4 * kWarps + static_cast<size_t>(channels) * (2 * states + kWarps * (states + 2));
}

template <bool kChunkStates>
void launch_forward(const SelectiveScan& scan, void* out, float* last_state, float* chunk_states, cudaStream_t stream) {
  with_type({nullptr, scan.type}, [&](auto* typed) {
    launch("selective_scan", selective_scan_kernel<Element<decltype(typed)>, kChunkStates>,
           dim3(static_cast<unsigned>(scan.batch * scan.dim)), dim3(kScanThreads), 4 * kWarps + 2 * scan.states, stream,
           scan, out, last_state, chunk_states);
  });
}

}  // namespace

void selective_scan(const SelectiveScan& scan, void* out, float* last_state, cudaStream_t stream) {
  launch_forward<false>(scan, out, last_state, nullptr, stream);
}

void selective_scan_chunk_states(const SelectiveScan& scan, float* chunk_states, cudaStream_t stream) {
  launch_forward<true>(scan, nullptr, nullptr, chunk_states, stream);
}

int selective_scan_channels_per_block(const SelectiveScan& scan) {
  constexpr int kMostChannels = 8, kBlocksThatFillAGpu = 1024;
  constexpr size_t kMostSharedFloats = 8 * 1024;
  const int per_group = scan.dim / scan.groups;
  int channels = 1;
  while (2 * channels <= kMostChannels && per_group % (2 * channels) == 0 &&
         scan.batch * scan.dim / (2 * channels) >= kBlocksThatFillAGpu &&
         backward_shared_floats(2 * channels, scan.states) <= kMostSharedFloats) {
    channels *= 2;
  }
  return channels;
}

void selective_scan_backward(const SelectiveScan& scan, const void* grad_out, const float* grad_last,
                             const float* chunk_states, const SelectiveScanGradients& gradients, cudaStream_t stream) {
  const int channels = selective_scan_channels_per_block(scan);
  with_type({nullptr, scan.type}, [&](auto* typed) {
    launch("selective_scan_backward", selective_scan_backward_kernel<Element<decltype(typed)>>,
           dim3(static_cast<unsigned>(scan.batch * scan.dim / channels)), dim3(kScanThreads),
           backward_shared_floats(channels, scan.states), stream, scan, grad_out, grad_last, chunk_states, gradients,
           channels);
  });
}

}  // namespace spatial_mamba
