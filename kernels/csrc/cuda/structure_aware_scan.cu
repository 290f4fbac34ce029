// The recurrence of the structure-aware scan over any image, in three steps: the map of the state by each row, the
// states before the rows, then all rows in parallel. The gradients take the same steps backwards.
#include <algorithm>

#include "row_scan.cuh"

namespace spatial_mamba {
namespace {

constexpr int kMaxThreads = kWarp * kMaxSegments;
constexpr int kCarryWarps = 16, kCarryThreads = kWarp * kCarryWarps;

__host__ __device__ int64_t rows_of(const Map& map) { return map.batch * map.height; }

// The map of each piece of a row for the state before it or, with kReverse, for the gradient that enters it. From token
// to token, that carry is decay (grad_h + carry).
template <class T, bool kReverse>
__global__ void __launch_bounds__(kMaxThreads)
    piece_maps_kernel(const __grid_constant__ Recurrence recurrence, const __grid_constant__ Strips strips,
                      const float* grad_h, Affine* piece_maps) {
  const Map& map = recurrence.map;
  RowWalk<T, kReverse> walk(recurrence, shared_memory);
  for (int64_t piece = blockIdx.x; piece < rows_of(map) * strips.count; piece += gridDim.x) {
    const int64_t row = piece / strips.count;
    const int strip = static_cast<int>(piece % strips.count);
    const int end = strip == strips.count - 1 ? map.width : strips.start(strip + 1);
    Affine walked;
    for (int start = strips.start(strip); start < end; start += walk.tile()) {
      Step steps[kTokens];
      walk.load_steps(steps, row, start, end);
      Affine own;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        Affine step = steps[k].map();
        if (kReverse) {
          const int64_t token = row * map.width + walk.column(start, k);
          step.input = steps[k].exists ? step.decay * grad_h[token * map.dim + walk.channel] : 0.0f;
        }
        own = own.then(step);
      }
      walk.before(own, walked);
    }
    if (threadIdx.y == 0 && walk.has_channel) piece_maps[piece * map.dim + walk.channel] = walked;
  }
}

// The carries into the pieces of each image (blockIdx.x), one after the other in the order of the walk, from zero. Each
// warp handles a part of them: first it finds the map of the whole part, then it fills in the carries.
template <bool kReverse>
__global__ void __launch_bounds__(kCarryThreads)
    carries_kernel(int pieces, int dim, const Affine* piece_maps, float* carries) {
  Affine* part_maps = reinterpret_cast<Affine*>(shared_memory);  // (warps, lanes)
  const int own_channel = blockIdx.y * kWarp + threadIdx.x;
  const int channel = min(own_channel, dim - 1);
  const int part_size = divide_up(pieces, kCarryWarps);
  const int first = min(static_cast<int>(threadIdx.y) * part_size, pieces), last = min(first + part_size, pieces);
  const int64_t image = static_cast<int64_t>(blockIdx.x) * pieces;
  const auto element = [&](int i) { return (image + (kReverse ? pieces - 1 - i : i)) * dim + channel; };

  Affine own;
#pragma unroll 8
  for (int i = first; i < last; ++i) own = own.then(piece_maps[element(i)]);
  part_maps[threadIdx.y * kWarp + threadIdx.x] = own;
  __syncthreads();
  float carry = 0.0f;
  for (unsigned warp = 0; warp < threadIdx.y; ++warp) carry = part_maps[warp * kWarp + threadIdx.x](carry);
  if (own_channel >= dim) return;
#pragma unroll 8
  for (int i = first; i < last; ++i) {
    carries[element(i)] = carry;
    carry = piece_maps[element(i)](carry);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    restore_states_kernel(const __grid_constant__ Recurrence recurrence, const float* row_states, float* h) {
  const Map& map = recurrence.map;
  RowWalk<T, false> walk(recurrence, shared_memory);
  for (int64_t row = blockIdx.x; row < rows_of(map); row += gridDim.x) {
    const float row_state = row_states[row * map.dim + walk.channel];
    Affine walked;
    for (int start = 0; start < map.width; start += walk.tile()) {
      Step steps[kTokens];
      walk.load_steps(steps, row, start, map.width);
      Affine own;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) own = own.then(steps[k].map());
      float state = walk.before(own, walked)(row_state);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        state = steps[k].map()(state);
        const int64_t token = row * map.width + walk.column(start, k);
        if (steps[k].exists && walk.has_channel) h[token * map.dim + walk.channel] = state;
      }
    }
  }
}

// grad_state is the full gradient of a state h = decay h_before + delta B u, that is grad_h + carry.
template <class T, class G>
__global__ void __launch_bounds__(kMaxThreads)
    recurrence_gradients_kernel(const __grid_constant__ Recurrence recurrence, const G* grad_y, const float* h,
                                const float* row_states, const float* row_carries, T* grad_u, float* grad_step,
                                float* grad_B, float* grad_A_log, float* grad_D) {
  const Map& map = recurrence.map;
  RowWalk<T, true> walk(recurrence, shared_memory);
  const float skip = recurrence.D[walk.channel];
  float sum_A_log = 0.0f, sum_D = 0.0f;
  for (int64_t row = blockIdx.x; row < rows_of(map); row += gridDim.x) {
    const int64_t row_element = row * map.dim + walk.channel;
    const float row_state = row_states[row_element], row_carry = row_carries[row_element];
    Affine walked;
    for (int start = 0; start < map.width; start += walk.tile()) {
      Step steps[kTokens];
      walk.load_steps(steps, row, start, map.width);
      float grad_h[kTokens];
      Affine own;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const int64_t token = row * map.width + walk.column(start, k);
        grad_h[k] = steps[k].exists ? grad_step[token * map.dim + walk.channel] : 0.0f;
        own = own.then({steps[k].decay, steps[k].decay * grad_h[k]});
      }
      float carry = walk.before(own, walked)(row_carry);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const Step& step = steps[k];
        if (!step.exists) continue;  // the same in the whole warp
        const int column = walk.column(start, k);
        const int64_t token = row * map.width + column;
        const int64_t element = token * map.dim + walk.channel;
        const float grad_state = grad_h[k] + carry;
        carry = step.decay * grad_state;

        const float h_before = column == 0 ? row_state : h[element - map.dim];
        const float grad_rate = carry * h_before;  // of delta * rate
        const float grad = load(grad_y + element);
        if (walk.has_channel) {
          store(grad_u + element, grad_state * step.delta * step.B + skip * grad);
          grad_step[element] = (grad_state * step.B * step.u + grad_rate * walk.rate) * sigmoid(step.before_softplus);
        }
        const float grad_B_of_warp = warp_sum(walk.has_channel ? grad_state * step.delta * step.u : 0.0f);
        if (threadIdx.x == 0) grad_B[blockIdx.y * rows_of(map) * map.width + token] = grad_B_of_warp;
        sum_A_log += grad_rate * step.delta * walk.rate;
        sum_D += grad * step.u;
      }
    }
  }
  sum_A_log = walk.sum_over_segments(sum_A_log);
  sum_D = walk.sum_over_segments(sum_D);
  if (threadIdx.y == 0 && walk.has_channel) {
    grad_A_log[static_cast<int64_t>(blockIdx.x) * map.dim + walk.channel] = sum_A_log;
    grad_D[static_cast<int64_t>(blockIdx.x) * map.dim + walk.channel] = sum_D;
  }
}

int segments_of(const Map& map) { return std::min(divide_up(map.width, kTokens), kMaxSegments); }

dim3 block_shape(const Map& map) { return dim3(kWarp, segments_of(map)); }

// Enough blocks to fill a GPU, each with several rows, which use the same weights for delta.
dim3 grid_over_rows(const Map& map) {
  constexpr int64_t kBlocksThatFillAGpu = 4096;
  const int channel_blocks = divide_up(map.dim, kWarp);
  const int64_t blocks = std::min(rows_of(map), divide_up<int64_t>(kBlocksThatFillAGpu, channel_blocks));
  return dim3(static_cast<unsigned>(blocks), channel_blocks);
}

template <bool kReverse>
void find_carries(const Recurrence& recurrence, const Strips& strips, const float* grad_h, float* piece_maps,
                  float* carries, cudaStream_t stream) {
  const Map& map = recurrence.map;
  auto* maps = reinterpret_cast<Affine*>(piece_maps);
  with_type(recurrence.u, [&](auto* u) {
    using T = Element<decltype(u)>;
    launch("piece_maps", piece_maps_kernel<T, kReverse>, grid_over_rows(map), block_shape(map),
           RowWalk<T, kReverse>::shared_floats(recurrence, segments_of(map)), stream, recurrence, strips, grad_h, maps);
  });
  launch("carries", carries_kernel<kReverse>, dim3(static_cast<unsigned>(map.batch), divide_up(map.dim, kWarp)),
         dim3(kWarp, kCarryWarps), 2 * kWarp * kCarryWarps, stream, map.height * strips.count, map.dim, maps, carries);
}

}  // namespace

void find_states(const Recurrence& recurrence, const Strips& strips, float* piece_maps, float* states,
                 cudaStream_t stream) {
  find_carries<false>(recurrence, strips, nullptr, piece_maps, states, stream);
}

void restore_states(const Recurrence& recurrence, const float* row_states, float* h, cudaStream_t stream) {
  const Map& map = recurrence.map;
  with_type(recurrence.u, [&](auto* u) {
    using T = Element<decltype(u)>;
    launch("restore_states", restore_states_kernel<T>, grid_over_rows(map), block_shape(map),
           RowWalk<T, false>::shared_floats(recurrence, segments_of(map)), stream, recurrence, row_states, h);
  });
}

void recurrence_gradients(const Recurrence& recurrence, Activations grad_y, const float* h, const float* row_states,
                          float* row_maps, float* row_carries, const RecurrenceGradients& gradients,
                          cudaStream_t stream) {
  const Map& map = recurrence.map;
  find_carries<true>(recurrence, kWholeRows, gradients.step, row_maps, row_carries, stream);
  with_types(recurrence.u, grad_y, [&](auto* u, auto* grad) {
    using T = Element<decltype(u)>;
    using G = Element<decltype(grad)>;
    launch("recurrence_gradients", recurrence_gradients_kernel<T, G>,
           dim3(partial_sums(map), divide_up(map.dim, kWarp)), block_shape(map),
           RowWalk<T, true>::shared_floats(recurrence, segments_of(map)), stream, recurrence, grad, h, row_states,
           row_carries, static_cast<T*>(gradients.u.data), gradients.step, gradients.B, gradients.A_log, gradients.D);
  });
}

}  // namespace spatial_mamba
