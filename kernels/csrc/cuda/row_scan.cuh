// The recurrence along the rows of an image, one channel per lane and a few neighbouring tokens per thread.
#pragma once

#include "common.cuh"

namespace spatial_mamba {

constexpr int kTokens = 4;        // per thread
constexpr int kMaxSegments = 16;  // warps per block, each with its own kTokens tokens; longer rows take several tiles

// The recurrence at one token: h = decay h_before + delta B u.
struct Step {
  float before_softplus, delta, decay, B, u;
  bool exists;  // false after the end of the walk, where the state does not change

  __device__ Affine map() const { return {decay, delta * B * u}; }
};

// Moves a block along rows of tokens, from left to right or, with kReverse, from right to left. All threads must call
// each method together. Positions count the tokens of a row in the order of the walk.
template <class T, bool kReverse>
class RowWalk {
 public:
  // Floats of shared memory that a walk needs.
  static int shared_floats(const Recurrence& recurrence, int segments) {
    return recurrence.rank * kWarp + segments * kTokens * (recurrence.rank + 2) + 2 * segments * kWarp;
  }

  __device__ RowWalk(const Recurrence& recurrence, float* memory)
      : recurrence_(recurrence),
        tile_(blockDim.y * kTokens),
        weights_(take(memory, recurrence.rank * kWarp)),
        projection_(take(memory, tile_ * (recurrence.rank + 2))),
        segments_(reinterpret_cast<Affine*>(take(memory, 2 * blockDim.y * kWarp))) {
    const int own = blockIdx.y * kWarp + threadIdx.x;
    has_channel = own < recurrence.map.dim;
    channel = min(own, recurrence.map.dim - 1);
    rate = rate_of(recurrence.A_log[channel]);
    bias_ = recurrence.step_bias[channel];
    for (int r = threadIdx.y; r < recurrence.rank; r += blockDim.y) {
      weights_[r * kWarp + threadIdx.x] = recurrence.step_weight[static_cast<int64_t>(channel) * recurrence.rank + r];
    }
  }

  __device__ int tile() const { return tile_; }

  // The column of this thread's k-th token in the tile that starts at a position; it may lie outside the row.
  __device__ int column(int tile_start, int k) const {
    const int position = tile_start + threadIdx.y * kTokens + k;
    return kReverse ? recurrence_.map.width - 1 - position : position;
  }

  // Load the tile of a row (counted over all images) that starts at a position; the walk ends before `end`. Between two
  // calls, `before` must be called.
  __device__ void load_steps(Step (&steps)[kTokens], int64_t row, int tile_start, int end) {
    const int width = recurrence_.map.width, pitch = recurrence_.rank + 2;
    const int count = min(tile_, end - tile_start);
    const int first_column = kReverse ? width - tile_start - count : tile_start;
    const T* source = static_cast<const T*>(recurrence_.projection.data) + (row * width + first_column) * pitch;
    // The previous tile was read before the barrier in `before`.
    for (int i = threadIdx.y * kWarp + threadIdx.x; i < count * pitch; i += blockDim.y * kWarp) {
      projection_[i] = load(source + i);
    }
    __syncthreads();

    const float* tokens[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      steps[k].exists = static_cast<int>(threadIdx.y) * kTokens + k < count;
      tokens[k] = projection_ + (steps[k].exists ? column(tile_start, k) - first_column : 0) * pitch;
      steps[k].before_softplus = bias_;
    }
    for (int r = 0; r < recurrence_.rank; ++r) {
      const float weight = weights_[r * kWarp + threadIdx.x];
#pragma unroll
      for (int k = 0; k < kTokens; ++k) steps[k].before_softplus += weight * tokens[k][r];
    }
    const T* u = static_cast<const T*>(recurrence_.u.data) + row * width * recurrence_.map.dim + channel;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      Step& step = steps[k];
      step.delta = step.exists ? softplus(step.before_softplus) : 0.0f;
      step.decay = step.exists ? fast_exp(step.delta * rate) : 1.0f;
      step.B = tokens[k][recurrence_.rank];
      step.u = step.exists ? load(u + static_cast<int64_t>(column(tile_start, k)) * recurrence_.map.dim) : 0.0f;
    }
  }

  // The map of the steps from the start of the walk to this thread's first token, from the map of its own steps.
  // `walked` is the map of all previous tiles; on return it includes this tile.
  __device__ Affine before(Affine own, Affine& walked) {
    segments_[threadIdx.y * kWarp + threadIdx.x] = own;
    __syncthreads();
    Affine result;
    for (unsigned segment = 0; segment < blockDim.y; ++segment) {
      if (segment == threadIdx.y) result = walked;
      walked = walked.then(segments_[segment * kWarp + threadIdx.x]);
    }
    return result;
  }

  // Sum over the block of one value per channel and thread; only the first warp gets it.
  __device__ float sum_over_segments(float value) {
    float* values = reinterpret_cast<float*>(segments_);
    __syncthreads();
    values[threadIdx.y * kWarp + threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned segment = 0; threadIdx.y == 0 && segment < blockDim.y; ++segment) {
      sum += values[segment * kWarp + threadIdx.x];
    }
    return sum;
  }

  int channel;       // valid in every lane
  bool has_channel;  // whether it belongs to this lane
  float rate;        // -exp(A_log)

 private:
  const Recurrence& recurrence_;
  int tile_;
  float *weights_, *projection_;
  Affine* segments_;
  float bias_;
};

}  // namespace spatial_mamba
