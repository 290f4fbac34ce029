// The structure-aware scan in one pass, for 3x3 fusion kernels with dilations 1, 3 and 5: states stay on the chip.
//
// A block moves down the rows of an image, or of a band and strip of it, for a few channels. Each thread has kTokens
// neighbouring columns of one channel. For each row it scans the states, writes them to shared memory, and adds their
// contributions to the up to eleven rows of outputs within reach, whose sums it keeps in registers. Then the uppermost
// of these rows is complete.
#include "stencil.cuh"

namespace spatial_mamba {
namespace {

constexpr int kTokens = kRunOfColumns;
constexpr int kMaxSegments = 16;  // threads along a row
constexpr int kMaxThreads = kChannels * kMaxSegments;
constexpr int kMaxColumns = kTokens * kMaxSegments;
constexpr int kVector = 4;  // floats per load from shared memory

int tokens_per_row(const Map& map, const Strips& strips) {
  return strips.count == 1 ? map.width : strips.columns + 2 * kReach;
}

int segments_of(const Map& map, const Strips& strips) { return segments_for(tokens_per_row(map, strips)); }

__host__ __device__ constexpr int padded(int rank) { return divide_up(rank, kVector) * kVector; }

template <class T, class Y>
class Stream {
 public:
  static size_t shared_floats(int rank, int segments) {
    const int tokens = segments * kTokens;
    return padded(rank) * kChannels + 2 * tokens * (padded(rank) + kVector) + 2 * segments * kChannels +
           (tokens + 2 * kReach) * kPitch;
  }

  __device__ Stream(const Recurrence& recurrence, const Cut& cut, const float* taps, const float* states,
                    float* row_states, Y* y)
      : recurrence_(recurrence),
        map_(recurrence.map),
        y_(y),
        states_(states),
        row_states_(row_states),
        channel_(min(static_cast<int>(blockIdx.y * kChannels + threadIdx.x), recurrence.map.dim - 1)),
        stencil_(taps + channel_, recurrence.map.dim, false) {
    const int strips = cut.strips.count;
    strip_ = blockIdx.x % strips;
    strips_ = strips;
    const int band = blockIdx.x / strips % cut.bands;
    image_ = blockIdx.x / strips / cut.bands;
    first_row_ = band * cut.band_rows;
    last_row_ = min(first_row_ + cut.band_rows, map_.height);
    first_output_ = strips == 1 ? 0 : strip_ * cut.strips.columns;
    last_output_ = strips == 1 ? map_.width : min(first_output_ + cut.strips.columns, map_.width);
    first_column_ = cut.strips.start(strip_);
    last_column_ = min(last_output_ + kReach, map_.width);
    own_column_ = first_column_ + static_cast<int>(threadIdx.y) * kTokens;
    own_columns_ = clamp(last_column_ - own_column_, kTokens + 1);

    has_channel_ = blockIdx.y * kChannels + threadIdx.x < static_cast<unsigned>(map_.dim);
    bias_ = recurrence.step_bias[channel_];
    rate_ = -expf(recurrence.A_log[channel_]);
    skip_ = recurrence.D[channel_];

    const int rank = recurrence.rank, tokens = blockDim.y * kTokens;
    float* memory = shared_memory;
    weights_ = take(memory, padded(rank) * kChannels);
    projections_ = take(memory, 2 * tokens * (padded(rank) + kVector));
    segments_ = reinterpret_cast<Affine*>(take(memory, 2 * blockDim.y * kChannels));
    row_ = take(memory, (tokens + 2 * kReach) * kPitch);
    for (int r = threadIdx.y; r < padded(rank); r += blockDim.y) {
      const float weight = recurrence.step_weight[static_cast<int64_t>(channel_) * rank + min(r, rank - 1)];
      weights_[r * kChannels + threadIdx.x] = r < rank ? weight : 0.0f;
    }
  }

  __device__ void run() {
    const int first = max(first_row_ - kReach, 0);
    carry_ = states_ == nullptr ? 0.0f : strip_state(first);
    for (int i = first; i < min(first + 2, map_.height); ++i) {
      load_projection(staged_, i, threadIdx.x);
      store_projection(staged_, i);
    }
    load_tokens(u_, first);
    __syncthreads();

    source_ = kNone;
    Sums even, odd;
    // Rows above and below the image repeat its first and last row.
    for (int i = first_row_ - kReach; i < last_row_ + kReach; i += 2) {
      visit_row(i, even, odd);
      if (i + 1 < last_row_ + kReach) visit_row(i + 1, odd, even);
    }
  }

 private:
  // Row i of states, or the row that it repeats; `opposite` and `same` are the sums for Stencil.
  __device__ __forceinline__ void visit_row(int i, Sums& opposite, Sums& same) {
    const int source = clamp(i, map_.height);
    const bool is_new = source != source_;
    if (is_new) {
      source_ = source;
      scan_row();
      begin_loads();
    }
    float u_done[kTokens], C_done[kTokens], done[kTokens];
    const int output = i - kReach;
    const bool completes = output >= first_row_;
    if (completes) load_read_out(u_done, C_done, output);

    float window[kWindow];
    load_window(row_, window);
    if (i >= first_row_ && i < last_row_) {  // sums of rows outside the band are never stored
      stencil_.contribute(i, [](int) { return true; }, window, opposite, same, done);
    } else {
      stencil_.contribute(
          i, [&](int row) { return row >= first_row_ && row < last_row_; }, window, opposite, same, done);
    }
    if (completes) store_outputs(output, done, u_done, C_done);
    if (is_new) finish_loads();
  }

  // Write the states of row source_ to row_, with its ends repeated.
  __device__ __forceinline__ void scan_row() {
    const float* projection = projection_of(source_) + static_cast<int>(threadIdx.y) * kTokens * projection_pitch();
    float decays[kTokens], inputs[kTokens];
    find_steps(projection, decays, inputs);
    Affine own;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) own = own.then({decays[k], inputs[k]});
    segments_[threadIdx.y * kChannels + threadIdx.x] = own;
    if (states_ == nullptr && source_ > 0) {  // the last state of the previous row
      carry_ = row_[(last_column_ - first_column_ - 1 + kReach) * kPitch + threadIdx.x];
    }
    if (row_states_ != nullptr && threadIdx.y == 0 && has_channel_) {
      row_states_[(image_ * map_.height + source_) * map_.dim + channel_] = carry_;
    }
    __syncthreads();

    float state = carry_;
    for (unsigned segment = 0; segment < threadIdx.y; ++segment) {
      state = segments_[segment * kChannels + threadIdx.x](state);
    }
    float* places = row_ + (static_cast<int>(threadIdx.y) * kTokens + kReach) * kPitch + threadIdx.x;
    const float before = state;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      state = decays[k] * state + inputs[k];
      if (k < own_columns_) places[k * kPitch] = state;
    }
    if (threadIdx.y == 0) repeat(places, -kPitch, decays[0] * before + inputs[0]);
    if (own_columns_ > 0 && own_column_ + own_columns_ == last_column_) {
      repeat(places + (own_columns_ - 1) * kPitch, kPitch, state);  // missing columns leave the state unchanged
    }
    __syncthreads();
  }

  // Load the rows after source_; some loads overlap with the fusion of its states.
  __device__ __forceinline__ void begin_loads() {
    if (source_ + 1 < map_.height) {
      load_tokens(u_, source_ + 1);
      if (states_ != nullptr) carry_ = strip_state(source_ + 1);
    }
    if (source_ + 2 < map_.height) load_projection(staged_, source_ + 2, threadIdx.x);
  }

  __device__ __forceinline__ void finish_loads() {
    // This overwrites row source_, which all threads have read.
    if (source_ + 2 < map_.height) store_projection(staged_, source_ + 2);
  }

  __device__ __forceinline__ void find_steps(const float* projection, float (&decays)[kTokens],
                                             float (&inputs)[kTokens]) const {
    float steps[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) steps[k] = bias_;
    for (int r = 0; r < padded(recurrence_.rank); r += kVector) {
      float weights[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) weights[j] = weights_[(r + j) * kChannels + threadIdx.x];
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const float4 values = *reinterpret_cast<const float4*>(projection + k * projection_pitch() + r);
        steps[k] += weights[0] * values.x;
        steps[k] += weights[1] * values.y;
        steps[k] += weights[2] * values.z;
        steps[k] += weights[3] * values.w;
      }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const float delta = softplus(steps[k]);
      const bool exists = k < own_columns_;
      decays[k] = exists ? fast_exp(delta * rate_) : 1.0f;
      inputs[k] = exists ? delta * projection[k * projection_pitch() + padded(recurrence_.rank)] * u_[k] : 0.0f;
    }
  }

  // The kReach places beyond an end of the row.
  __device__ __forceinline__ static void repeat(float* end, int pitch, float state) {
#pragma unroll
    for (int j = 1; j <= kReach; ++j) end[j * pitch] = state;
  }

  __device__ int projection_pitch() const { return padded(recurrence_.rank) + kVector; }

  __device__ float* projection_of(int row) const {
    return projections_ + (row % 2) * static_cast<int>(blockDim.y) * kTokens * projection_pitch();
  }

  // In shared memory, the projection of a token is r, padded with zeros to a whole vector, and B; C is not needed yet.
  // A thread loads the elements threadIdx.x, threadIdx.x + kChannels, ... of kTokens tokens, the first of them through
  // registers.
  __device__ __forceinline__ void load_projection(float (&values)[kTokens], int row, int element) const {
    const int rank = recurrence_.rank;
    const T* source = static_cast<const T*>(recurrence_.projection.data) + token(row, first_column_) * (rank + 2);
    const bool is_B = element == padded(rank);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int slot = static_cast<int>(threadIdx.y) * kTokens + k;
      const int existing = min(slot, last_column_ - first_column_ - 1);
      const float value = load(source + existing * (rank + 2) + min(element, rank));
      values[k] = element < rank || is_B ? value : 0.0f;
    }
  }

  __device__ __forceinline__ void store_projection(const float (&first)[kTokens], int row) const {
    float* target = projection_of(row) + static_cast<int>(threadIdx.y) * kTokens * projection_pitch();
    const int count = padded(recurrence_.rank) + 1;
    for (int element = threadIdx.x; element < count; element += kChannels) {
      float values[kTokens];
      if (element >= kChannels) load_projection(values, row, element);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        target[k * projection_pitch() + element] = element < kChannels ? first[k] : values[k];
      }
    }
  }

  __device__ int64_t token(int row, int column) const { return (image_ * map_.height + row) * map_.width + column; }

  __device__ float strip_state(int row) const {
    return states_[((image_ * map_.height + row) * strips_ + strip_) * map_.dim + channel_];
  }

  __device__ __forceinline__ void load_columns(float (&values)[kTokens], const T* first, int pitch) const {
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      values[k] = k < own_columns_ ? load(first + k * static_cast<int64_t>(pitch)) : 0.0f;
  }

  __device__ __forceinline__ void load_tokens(float (&u)[kTokens], int row) const {
    const T* first = static_cast<const T*>(recurrence_.u.data) + token(row, own_column_) * map_.dim + channel_;
    load_columns(u, first, map_.dim);
  }

  __device__ __forceinline__ void load_read_out(float (&u)[kTokens], float (&C)[kTokens], int row) const {
    load_tokens(u, row);
    const int pitch = recurrence_.rank + 2;
    const T* first = static_cast<const T*>(recurrence_.projection.data) + token(row, own_column_) * pitch + pitch - 1;
    load_columns(C, first, pitch);
  }

  __device__ __forceinline__ void store_outputs(int row, const float (&fused)[kTokens], const float (&u)[kTokens],
                                                const float (&C)[kTokens]) const {
    Y* first = y_ + token(row, own_column_) * map_.dim + channel_;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const bool own = own_column_ + k >= first_output_ && own_column_ + k < last_output_;
      if (has_channel_ && own) store(first + k * static_cast<int64_t>(map_.dim), C[k] * fused[k] + skip_ * u[k]);
    }
  }

  const Recurrence& recurrence_;
  const Map& map_;
  Y* y_;
  const float* states_;
  float* row_states_;

  int channel_;
  Stencil stencil_;
  int64_t image_;
  int strip_, strips_;
  int first_row_, last_row_;        // of the outputs
  int first_output_, last_output_;  // columns of the outputs
  int first_column_, last_column_;  // columns of the states
  int own_column_, own_columns_;    // this thread's first one, and how many of them exist
  bool has_channel_;
  float bias_, rate_, skip_;

  float *weights_, *projections_;  // (padded rank, channels); two rows of (tokens, padded rank + B)
  Affine* segments_;               // (segments, channels)
  float* row_;                     // the states of row source_: (reach + tokens + reach, channels)

  static constexpr int kNone = -1;
  int source_;                // the last row scanned
  float carry_, u_[kTokens];  // of row source_ until it is scanned, then of the next row
  float staged_[kTokens];     // of the projection of the row after the next
};

template <class T, class Y>
__global__ void __launch_bounds__(kMaxThreads, 2)
    stream_scan_kernel(const __grid_constant__ Recurrence recurrence, const __grid_constant__ Cut cut,
                       const float* taps, const float* states, float* row_states, Y* y) {
  Stream<T, Y>(recurrence, cut, taps, states, row_states, y).run();
}

}  // namespace

Cut streaming_cut(const Map& map) {
  Cut cut;
  cut.strips = kWholeRows;
  if (map.width > kMaxColumns) {
    const int columns = divide_up(map.width, divide_up(map.width, kMaxColumns - 2 * kReach));
    cut.strips = {divide_up(map.width, columns), columns, kReach};
  }
  const int64_t blocks = map.batch * divide_up(map.dim, kChannels) * cut.strips.count;
  cut.band_rows = divide_up(map.height, bands_for(blocks, map.height));
  cut.bands = divide_up(map.height, cut.band_rows);
  return cut;
}

void stream_scan(const Recurrence& recurrence, const Cut& cut, const float* taps, const float* states,
                 float* row_states, Activations y, cudaStream_t stream) {
  const Map& map = recurrence.map;
  const int segments = segments_of(map, cut.strips);
  const dim3 grid(static_cast<unsigned>(map.batch * cut.bands * cut.strips.count), divide_up(map.dim, kChannels));
  with_types(recurrence.u, y, [&](auto* u, auto* out) {
    using T = Element<decltype(u)>;
    using Y = Element<decltype(out)>;
    launch("stream_scan", stream_scan_kernel<T, Y>, grid, dim3(kChannels, segments),
           Stream<T, Y>::shared_floats(recurrence.rank, segments), stream, recurrence, cut, taps, states, row_states,
           out);
  });
}

}  // namespace spatial_mamba
