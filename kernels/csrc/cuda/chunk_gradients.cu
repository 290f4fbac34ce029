// The gradients through state fusion and the recurrence in one pass, up the rows of whole images: the adjoint of the
// fusion, the reverse scan, and the gradients of the recurrence's inputs. States are computed again, row by row.
#include "chunks.cuh"

namespace spatial_mamba {
namespace {

constexpr int kRuns = 32;  // per block

// The adjoint of the fusion, from a ring of gradients of fused states with zeros outside the image.
//
// With replicate padding, the first and last row and column get the gradients of all outputs that read beyond them.
template <class V>
struct Adjoint {
  const Ring& ring;
  int window;  // the place of this run's window in a row of the ring
  int height, row;
  bool is_left, is_right;  // whether the run has the first and the last column
  int last;                // of the run's columns
  const V* taps;           // of this thread's channels, in shared memory: they would take too many registers

  // Add the taps of one row offset to `grad_h`; what is beyond the last column to `right`.
  template <int kOffset, int kFirst>
  __device__ __forceinline__ void add(V (&grad_h)[kRun], V& right) const {
    // The rows whose outputs read this row at that offset.
    const int source = row - kOffset;
    const int first = max(kOffset < 0 && row == 0 ? 0 : source, 0);
    const int end = min(kOffset > 0 && row == height - 1 ? height - 1 : source, height - 1);
#pragma unroll 1
    for (int i = first; i <= end; ++i) {
      const V* gradients = reinterpret_cast<const V*>(ring.row(i) + window) + threadIdx.x;
      V values[kRunWindow];
#pragma unroll
      for (int j = 0; j < kRunWindow; ++j) values[j] = gradients[j * kLanes<V>];
      constexpr int kDilation = kOffset < 0 ? -kOffset : kOffset, kCount = kDilation == 0 ? 7 : 3;
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          grad_h[k] += taps[(kFirst + t) * kLanes<V>] * values[k + kReach - tap_column(kDilation, t)];
        }
      }
      if (is_left) {
#pragma unroll
        for (int t = kCount / 2 - 1; t >= 0; --t) {
          const int reach = -tap_column(kDilation, t);
          V beyond = 0.0f;
#pragma unroll
          for (int j = 0; j < reach; ++j) beyond += values[kReach + j];
          grad_h[0] += taps[(kFirst + t) * kLanes<V>] * beyond;
        }
      }
      if (is_right) {
        const V* end_of_row = gradients + (kReach + last) * kLanes<V>;
#pragma unroll
        for (int t = kCount / 2 + 1; t < kCount; ++t) {
          const int reach = tap_column(kDilation, t);
          V beyond = 0.0f;
#pragma unroll
          for (int j = 0; j < reach; ++j) beyond += end_of_row[-j * kLanes<V>];
          right += taps[(kFirst + t) * kLanes<V>] * beyond;
        }
      }
    }
  }
};

// grad_state is the full gradient of a state h = decay h_before + delta B u: that from its own row, grad_h, plus the
// carry, decay times the grad_state of the next token.
template <class T, class G, class V, bool kWhole>
__global__ void __launch_bounds__(kRuns* kLanes<V>, 2)
    chunk_gradients_kernel(const __grid_constant__ Recurrence recurrence, const __grid_constant__ Cut cut,
                           const G* grad_y, const float* taps, const float* row_states, T* grad_u, float* grad_step,
                           float* grad_B, float* grad_A_log, float* grad_D) {
  float* memory = shared_memory;
  const Map& map = recurrence.map;
  const Walk<T, V, kWhole> walk(recurrence, cut, taps, memory);
  const Ring ring(cut, 0, map.height, map.height, memory);
  const int columns = walk.columns, window = walk.run * kRun * kChannels;
  const bool has_row = walk.row_of_chunk < cut.rows;
  const V skip = walk.weight(recurrence.D);
  grad_y = walk.image_of(grad_y, map.dim);
  grad_u = walk.image_of(grad_u, map.dim);
  grad_step = walk.image_of(grad_step, map.dim);
  grad_B = walk.image_of(grad_B, 1) + walk.group * map.batch * map.height * map.width;
  V sum_A_log = 0.0f, sum_D = 0.0f;
  ring.clear();

  int loaded = map.height;  // the first row of gradients in the ring
  const int chunks = divide_up(map.height, cut.rows);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int start = (chunks - 1 - chunk) * cut.rows;
    // The gradients of fused states, C grad_y.
    const int needed = max(start - kReach, 0);
    for (int i = needed + walk.row_of_chunk; i < loaded && has_row; i += cut.rows) {
      Raw<V, G> grad[kRun];
      walk.load_run(grad, grad_y, i);
      V* target = reinterpret_cast<V*>(ring.row(i) + window + kReach * kChannels) + threadIdx.x;
      float C[kRun];
      walk.load_C(C, i);
#pragma unroll
      for (int k = 0; k < kRun; ++k) target[k * kLanes<V>] = k < columns ? V(C[k]) * grad[k].value() : V(0.0f);
    }
    loaded = needed;

    // The states before the tokens.
    const bool exists = has_row && start + walk.row_of_chunk < map.height;
    const int row = min(start + walk.row_of_chunk, map.height - 1), count = exists ? columns : 0;
    Raw<V, T> u[kRun];
    walk.load_run(u, walk.u, row);
    if (has_row && chunk + 1 < chunks) walk.prefetch(start - cut.rows + walk.row_of_chunk);
    V steps[kRun], deltas[kRun], decays[kRun], before[kRun];
    walk.project(row, steps);
    walk.discretise(steps, count, deltas, decays);
    AffineMap<V> own;
    const float own_B = walk.own_B();
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      u[k].settle();
      before[k] = deltas[k] * (kLn2 * walk.of_column(own_B, k)) * u[k].value();  // the input, until the state is known
      own = own.then({decays[k], before[k]});
    }
    const V row_state = walk.weight(row_states + (walk.image * map.height + row) * map.dim);
    if (walk.run == 0) own = {0.0f, own(row_state)};
    V state = walk.template enter<false>(own, nullptr, nullptr);
    if (walk.run == 0) state = row_state;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const V next = decays[k] * state + before[k];
      before[k] = state;
      state = next;
    }

    // The gradients of states, first of each row alone; then the carries.
    V grad_h[kRun] = {}, right = 0.0f;
    const bool is_right = walk.column + columns == map.width;
    const Adjoint<V> adjoint{ring, window, map.height, row, walk.column == 0, is_right, columns - 1, walk.taps};
    if (count > 0) {
      adjoint.template add<-5, 0>(grad_h, right);
      adjoint.template add<-3, 3>(grad_h, right);
      adjoint.template add<-1, 6>(grad_h, right);
      adjoint.template add<0, 9>(grad_h, right);
      adjoint.template add<1, 16>(grad_h, right);
      adjoint.template add<3, 19>(grad_h, right);
      adjoint.template add<5, 22>(grad_h, right);
    }
    AffineMap<V> reverse;
#pragma unroll
    for (int k = kRun - 1; k >= 0; --k) {
      if (k == columns - 1) grad_h[k] += right;
      if (k >= count) grad_h[k] = V(0.0f);
      reverse = reverse.then({decays[k], decays[k] * grad_h[k]});
    }
    Raw<V, G> grad[kRun];
    walk.load_run(grad, grad_y, row);
    V carry = walk.template enter<true>(reverse, walk.carry(chunk), walk.carry(chunk + 1));

    V grad_of_u[kRun], grad_of_step[kRun];
#pragma unroll
    for (int k = kRun - 1; k >= 0; --k) {
      const V grad_state = grad_h[k] + carry;
      carry = decays[k] * grad_state;
      const V grad_rate = carry * before[k];  // of delta * rate
      const V own_u = u[k].value(), own_grad = grad[k].value(), through_delta = grad_state * deltas[k];
      const float B = walk.of_column(own_B, k);
      grad_of_u[k] = through_delta * (kLn2 * B) + skip * own_grad;
      grad_of_step[k] = (grad_state * own_u * B + grad_rate * walk.rate) * each(sigmoid_base2, steps[k]);
      sum_A_log += grad_rate * deltas[k];
      sum_D += own_grad * (k < count ? own_u : V(0.0f));
      grad_h[k] = through_delta * (k < count && walk.has_channel ? own_u : V(0.0f));  // the gradient of B
    }
    if (count > 0 && walk.has_channel) {
      walk.over_run(grad_u, row, [&](int k, T* target) {
        if (k < columns) store_value(target, grad_of_u[k]);
      });
      walk.over_run(grad_step, row, [&](int k, float* target) {
        if (k < columns) store_value(target, grad_of_step[k]);
      });
    }
    const float sum = sum_over_channels(grad_h);
    const int k = threadIdx.x * 8 / kLanes<V>;
    if (threadIdx.x % (kLanes<V> / 8) == 0 && k < count) grad_B[walk.token(row, walk.column + k)] = kLn2 * sum;
  }

  V* sums = reinterpret_cast<V*>(shared_memory);  // (2, runs, channels)
  __syncthreads();
  sums[threadIdx.y * kLanes<V> + threadIdx.x] = sum_A_log;
  sums[(blockDim.y + threadIdx.y) * kLanes<V> + threadIdx.x] = sum_D;
  __syncthreads();
  if (threadIdx.y < 2 && walk.has_channel) {
    V sum = 0.0f;
    for (unsigned i = 0; i < blockDim.y; ++i) sum += sums[(threadIdx.y * blockDim.y + i) * kLanes<V> + threadIdx.x];
    if (threadIdx.y == 0) sum = sum * walk.rate * kLn2;
    float* const sums_of_blocks = threadIdx.y == 0 ? grad_A_log : grad_D;
    store_value(sums_of_blocks + static_cast<int64_t>(walk.part) * map.dim + walk.channel, sum);
  }
}

template <class T>
size_t shared_floats(const Recurrence& recurrence, const Cut& cut) {
  return std::max<size_t>(2 * threads_of<Pair>(cut).y * kChannels,
                          Walk<T, Pair, false>::shared_floats(recurrence.rank, cut) + Ring::floats(cut));
}

}  // namespace

bool chunk_gradients_serve(const Recurrence& recurrence, Activations grad_y) {
  const Cut cut = cut_into_chunks(recurrence.map, kRuns, /*undivided=*/true);
  return cut.strips.count == 1 && suits_chunks(recurrence, grad_y) &&
         fits_shared_memory(shared_floats<__nv_bfloat16>(recurrence, cut));
}

void chunk_gradients(const Recurrence& recurrence, Activations grad_y, const float* taps, const float* row_states,
                     const RecurrenceGradients& gradients, cudaStream_t stream) {
  const Map& map = recurrence.map;
  const Cut cut = cut_into_chunks(map, kRuns, /*undivided=*/true);
  with_types(recurrence.u, grad_y, [&](auto* u, auto* grad) {
    with_whole_runs(map, cut, [&](auto whole) {
      using T = Element<decltype(u)>;
      using G = Element<decltype(grad)>;
      launch("chunk_gradients", chunk_gradients_kernel<T, G, Pair, whole>, grid_of(map, cut), threads_of<Pair>(cut),
             shared_floats<T>(recurrence, cut), stream, recurrence, cut, grad, taps, row_states,
             static_cast<T*>(gradients.u.data), gradients.step, gradients.B, gradients.A_log, gradients.D);
    });
  });
}

}  // namespace spatial_mamba
