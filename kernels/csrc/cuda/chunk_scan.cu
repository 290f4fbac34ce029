// The structure-aware scan in one pass, for 3x3 fusion kernels with dilations 1, 3 and 5, and the gradients of C and of
// the taps, which need the fused states again. States stay in shared memory.
#include "chunks.cuh"

namespace spatial_mamba {
namespace {

constexpr int kScanRuns = 32, kGradientRuns = 16;  // per block

// Scans chunks of rows into a ring, and visits the rows whose neighbours are complete.
template <class T, class V, bool kWhole>
class Scan : public Walk<T, V, kWhole> {
 public:
  using Base = Walk<T, V, kWhole>;
  using Base::cut;
  using Base::map;

  static size_t shared_floats(int rank, const Cut& cut) {
    return Base::shared_floats(rank, cut) + Ring::floats(cut);
  }

  // `states`: before each row and strip, or null if the image is not divided; then row_states are written.
  __device__ Scan(const Recurrence& recurrence, const Cut& cut, const float* taps, const float* states,
                  float* row_states, float*& memory)
      : Base(recurrence, cut, taps, memory),
        states_(states),
        row_states_(row_states),
        ring_(cut, this->first_row, this->last_row, recurrence.map.height, memory) {}

  // Calls visit(row, is_own) for all rows of results; rows beyond the last one are not the thread's own.
  template <class Visit>
  __device__ __forceinline__ void visit_rows(const Visit& visit) {
    const int end = min(this->last_row + kReach, map.height);
    int next = this->first_row, chunk = 0;
    for (int start = max(this->first_row - kReach, 0); start < end; start += cut.rows, ++chunk) {
      scan(start, end, chunk);
      const int next_row = start + cut.rows + this->row_of_chunk;
      if (this->row_of_chunk < cut.rows && next_row < end) this->prefetch(next_row);
      const int scanned = min(start + cut.rows, end);
      const int ready = min(scanned == map.height ? scanned : scanned - kReach, this->last_row);
      for (; next < ready; next += min(cut.rows, ready - next)) {
        const int row = next + this->row_of_chunk;
        visit(min(row, ready - 1), row < ready && this->row_of_chunk < cut.rows);
      }
    }
  }

  // Calls body(t, tap, column, state) for all taps and columns of this run, with the states around a row.
  template <class Body>
  __device__ __forceinline__ void over_stencil(int row, const Body& body) const {
    constexpr int kRows[] = {-5, -3, -1, 0, 1, 3, 5}, kFirst[] = {0, 3, 6, 9, 16, 19, 22};
    const int window = this->run * kRun * kChannels;
#pragma unroll
    for (int n = 0; n < 7; ++n) {
      const V* line = reinterpret_cast<const V*>(ring_.row(row + kRows[n]) + window) + threadIdx.x;
      V states[kRunWindow];
#pragma unroll
      for (int j = 0; j < kRunWindow; ++j) states[j] = line[j * kLanes<V>];
      const int dilation = kRows[n] < 0 ? -kRows[n] : kRows[n];
#pragma unroll
      for (int t = 0; t < (dilation == 0 ? 7 : 3); ++t) {
        const V tap = this->taps[(kFirst[n] + t) * kLanes<V>];
#pragma unroll
        for (int k = 0; k < kRun; ++k) body(kFirst[n] + t, tap, k, states[k + kReach + tap_column(dilation, t)]);
      }
      keep_order();
    }
  }

  // C at the tokens of this run.
  __device__ const float* C_of_run(int row) const { return ring_.C(row) + this->run * kRun; }

  // Whether the k-th column of this run is one of the results.
  __device__ bool has_output(int k) const {
    const int own = this->column + k;
    return k < this->columns && (kWhole || (own >= this->first_output && own < this->last_output));
  }

  __device__ void clear() const { ring_.clear(); }

 private:
  // Write the states of a chunk to the ring, with the ends of rows repeated.
  __device__ __forceinline__ void scan(int start, int end, int chunk) {
    const bool exists = this->row_of_chunk < cut.rows && start + this->row_of_chunk < end;
    const int row = min(start + this->row_of_chunk, end - 1), count = exists ? this->columns : 0;
    Raw<V, T> u[kRun];
    this->load_run(u, this->u, row);
    V steps[kRun], inputs[kRun], decays[kRun];
    this->project(row, steps);
    this->discretise(steps, count, inputs, decays);
    AffineMap<V> own;
    const float own_B = kLn2 * this->own_B();
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      u[k].settle();
      inputs[k] = inputs[k] * this->of_column(own_B, k) * u[k].value();
      own = k == 0 ? AffineMap<V>{decays[k], inputs[k]} : own.then({decays[k], inputs[k]});
    }
    const bool starts = this->run == 0;
    V row_state = 0.0f;
    if (states_ != nullptr && starts) {  // the state is known
      const int64_t strip_of_row = (this->image * map.height + row) * cut.strips.count + this->strip;
      row_state = this->weight(states_ + strip_of_row * map.dim);
      own = {0.0f, own(row_state)};
    }
    V state = this->template enter<false>(own, this->carry(chunk), this->carry(chunk + 1));
    if (states_ != nullptr && starts) state = row_state;
    if (count > 0) {
      if (row_states_ != nullptr && starts && this->has_channel) {
        store_value(row_states_ + (this->image * map.height + row) * map.dim + this->channel, state);
      }
      if (static_cast<int>(threadIdx.x) < kRun) ring_.C(row)[this->run * kRun + threadIdx.x] = this->own_C();
      V* target = reinterpret_cast<V*>(ring_.row(row) + (this->run * kRun + kReach) * kChannels) + threadIdx.x;
      const V first = decays[0] * state + inputs[0];
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        state = decays[k] * state + inputs[k];
        target[k * kLanes<V>] = state;  // columns after the last one repeat it
      }
      if (starts) repeat(target, -kLanes<V>, first);
      if (this->column + count == this->last_column) {
        repeat(target + (count - 1) * kLanes<V>, kLanes<V>, state);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ static void repeat(V* end, int pitch, V state) {
#pragma unroll
    for (int j = 1; j <= kReach; ++j) end[j * pitch] = state;
  }

  const float* states_;
  float* row_states_;
  const Ring ring_;
};

template <class T, class Y, class V, bool kWhole>
__global__ void __launch_bounds__(kScanRuns* kLanes<V>, 3)
    chunk_scan_kernel(const __grid_constant__ Recurrence recurrence, const __grid_constant__ Cut cut,
                      const float* taps, const float* states, float* row_states, Y* y) {
  float* memory = shared_memory;
  Scan<T, V, kWhole> scan(recurrence, cut, taps, states, row_states, memory);
  const V skip = scan.weight(recurrence.D);
  y = scan.image_of(y, scan.map.dim);
  scan.visit_rows([&](int row, bool is_own) {
    constexpr bool kFetches = sizeof(T) == 2;
    Raw<V, T> u[kRun];
    if constexpr (kFetches) {
      scan.fetch_run(scan.u, row);
    } else {
      scan.load_run(u, scan.u, row);
    }
    V fused[kRun] = {};
    scan.over_stencil(row, [&](int, V tap, int k, V state) { fused[k] += tap * state; });
    const float* C = scan.C_of_run(row);
    wait_for_copies();
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      fused[k] = V(C[k]) * fused[k] + skip * (kFetches ? scan.fetched(k) : u[k].value());
    }
    if (!is_own || !scan.has_channel) return;
    scan.over_run(y, row, [&](int k, Y* target) {
      if (scan.has_output(k)) store_value(target, fused[k]);
    });
  });
}

// Gradients: grad_C (groups of channels, batch, H, W), grad_taps (blocks, taps, dim).
template <class T, class G, class V, bool kWhole>
__global__ void __launch_bounds__(kGradientRuns* kLanes<V>, 3)
    read_out_gradients_kernel(const __grid_constant__ Recurrence recurrence, const __grid_constant__ Cut cut,
                              const G* grad_y, const float* taps, const float* states, float* grad_C,
                              float* grad_taps) {
  static_assert(kChannelsOf<V> == 1);
  float* memory = shared_memory;
  Scan<T, V, kWhole> scan(recurrence, cut, taps, states, nullptr, memory);
  scan.clear();
  V sums[kTaps] = {};
  grad_y = scan.image_of(grad_y, scan.map.dim);
  grad_C = scan.image_of(grad_C, 1) + scan.group * scan.map.batch * scan.map.height * scan.map.width;
  scan.visit_rows([&](int row, bool is_own) {
    Raw<V, G> loaded[kRun];
    scan.load_run(loaded, grad_y, row);
    const float* C = scan.C_of_run(row);
    V grad[kRun], grad_fused[kRun], fused[kRun] = {};
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      grad[k] = is_own && scan.has_channel && scan.has_output(k) ? loaded[k].value() : V(0.0f);
      grad_fused[k] = V(C[k]) * grad[k];
    }
    scan.over_stencil(row, [&](int t, V tap, int k, V state) {
      fused[k] += tap * state;
      sums[t] += grad_fused[k] * state;
    });
#pragma unroll
    for (int k = 0; k < kRun; ++k) grad[k] = grad[k] * fused[k];
    const float sum = sum_over_channels(grad);
    const int k = threadIdx.x * 8 / kLanes<V>;
    if (is_own && threadIdx.x % (kLanes<V> / 8) == 0 && scan.has_output(k)) {
      grad_C[scan.token(row, scan.column + k)] = sum;
    }
  });

  float* of_warps = shared_memory;  // (warps, taps, channels)
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const float sum = sums[t] + __shfl_xor_sync(kAllLanes, sums[t], kChannels);
    if (threadIdx.y % 2 == 0) of_warps[(threadIdx.y / 2 * kTaps + t) * kChannels + threadIdx.x] = sum;
  }
  __syncthreads();
  for (int t = threadIdx.y; t < kTaps && scan.has_channel; t += blockDim.y) {
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.y / 2; ++warp) {
      sum += of_warps[(warp * kTaps + t) * kChannels + threadIdx.x];
    }
    grad_taps[(static_cast<int64_t>(scan.part) * kTaps + t) * scan.map.dim + scan.channel] = sum;
  }
}

}  // namespace

Cut chunk_scan_cut(const Map& map) { return cut_into_chunks(map, kScanRuns); }

bool chunk_scan_serves(const Recurrence& recurrence, Activations y) {
  return suits_chunks(recurrence, y) &&
         fits_shared_memory(
             Scan<__nv_bfloat16, Pair, false>::shared_floats(recurrence.rank, chunk_scan_cut(recurrence.map)));
}

void chunk_scan(const Recurrence& recurrence, const float* taps, const float* states, float* row_states, Activations y,
                cudaStream_t stream) {
  const Cut cut = chunk_scan_cut(recurrence.map);
  with_types(recurrence.u, y, [&](auto* u, auto* out) {
    with_whole_runs(recurrence.map, cut, [&](auto whole) {
      using T = Element<decltype(u)>;
      using Y = Element<decltype(out)>;
      launch("chunk_scan", chunk_scan_kernel<T, Y, Pair, whole>, grid_of(recurrence.map, cut), threads_of<Pair>(cut),
             Scan<T, Pair, whole>::shared_floats(recurrence.rank, cut), stream, recurrence, cut, taps, states,
             row_states, out);
    });
  });
}

Cut read_out_gradients_cut(const Map& map) { return cut_into_chunks(map, kGradientRuns); }

void read_out_gradients(const Recurrence& recurrence, Activations grad_y, const float* taps, const float* states,
                        float* grad_C, float* grad_taps, cudaStream_t stream) {
  const Cut cut = read_out_gradients_cut(recurrence.map);
  with_types(recurrence.u, grad_y, [&](auto* u, auto* grad) {
    with_whole_runs(recurrence.map, cut, [&](auto whole) {
      using T = Element<decltype(u)>;
      using G = Element<decltype(grad)>;
      const dim3 threads = threads_of<float>(cut);
      const size_t sums = threads.y / 2 * kTaps * kChannels;
      launch("read_out_gradients", read_out_gradients_kernel<T, G, float, whole>, grid_of(recurrence.map, cut), threads,
             std::max(sums, Scan<T, float, whole>::shared_floats(recurrence.rank, cut)), stream, recurrence, cut, grad,
             taps, states, grad_C, grad_taps);
    });
  });
}

}  // namespace spatial_mamba
