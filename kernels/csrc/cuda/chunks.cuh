// The recurrence of the structure-aware scan in chunks of rows, for 3x3 fusion kernels with dilations 1, 3 and 5.
//
// A block has a few channels of an image, or of a band and strip of it, and goes through the rows in chunks. A thread
// has a run of neighbouring columns of one row of a chunk. All runs of a chunk are scanned at once. The states go to a
// ring of rows in shared memory, from which the stencil reads them.
#pragma once

#include <algorithm>

#include "channels.cuh"

namespace spatial_mamba {

constexpr int kRun = 7;  // divides the widths of all stages of 224x224 images
constexpr int kRunWindow = kRun + 2 * kReach;
constexpr int kVector = 4;  // floats per load from shared memory

__host__ __device__ constexpr int padded(int rank) { return divide_up(rank, kVector) * kVector; }

// Division of images for blocks with at most `runs_per_block` runs. Undivided images are not cut into bands of rows.
inline Cut cut_into_chunks(const Map& map, int runs_per_block, bool undivided = false) {
  constexpr int kMostColumns = 16 * kRun;
  Cut cut;
  cut.strips = kWholeRows;
  int columns = map.width;
  if (map.width > kMostColumns) {
    const int own = divide_up(map.width, divide_up(map.width, kMostColumns - 2 * kReach));
    cut.strips = {divide_up(map.width, own), own, kReach};
    columns = own + 2 * kReach;
  }
  cut.runs = divide_up(columns, kRun);
  const int64_t blocks = map.batch * divide_up(map.dim, kChannels) * cut.strips.count;
  cut.band_rows = divide_up(map.height, undivided ? 1 : bands_for(blocks, map.height));
  cut.bands = divide_up(map.height, cut.band_rows);
  const int scanned = std::min(map.height, cut.bands == 1 ? map.height : cut.band_rows + 2 * kReach);
  const int most = std::max(1, runs_per_block / cut.runs);
  cut.rows = divide_up(scanned, divide_up(scanned, most));
  cut.ring = std::min(scanned, cut.rows + 2 * kReach);
  return cut;
}

inline dim3 grid_of(const Map& map, const Cut& cut) {
  const int64_t blocks = map.batch * cut.bands * cut.strips.count * divide_up(map.dim, kChannels);
  return dim3(static_cast<unsigned>(blocks));
}

// Whole warps.
template <class V>
dim3 threads_of(const Cut& cut) {
  constexpr int kRunsOfWarp = kWarp / kLanes<V>;
  return dim3(kLanes<V>, divide_up(cut.rows * cut.runs, kRunsOfWarp) * kRunsOfWarp);
}

// Whether threads can load pairs of channels, index a run's projections in few bits, and the bytes of an image in 32.
inline bool suits_chunks(const Recurrence& recurrence, Activations other) {
  const Map& map = recurrence.map;
  const int channels = std::max(map.dim, recurrence.rank + 2);
  return are_aligned(2, {map.dim}, {recurrence.u, recurrence.projection, other}) && recurrence.rank <= 128 &&
         map.batch * map.height * map.width < int64_t{1} << 32 &&
         static_cast<int64_t>(map.height) * map.width * channels < int64_t{1} << 30;
}

// Rows of a map in shared memory, (ring, columns, channels), each followed by C of its tokens. The columns start kReach
// before the block's first one.
class Ring {
 public:
  static size_t floats(const Cut& cut) { return table_size(cut) + static_cast<size_t>(cut.ring) * pitch_of(cut.runs); }

  // For the rows that results from `first_row` to `last_row` - 1 depend on.
  __device__ Ring(const Cut& cut, int first_row, int last_row, int height, float*& free_memory)
      : columns_(cut.runs * kRun + 2 * kReach), size_(cut.ring * pitch_of(cut.runs)) {
    memory_ = take(free_memory, size_);
    table_ = reinterpret_cast<int*>(take(free_memory, table_size(cut))) + kReach - first_row;
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int row = first_row - kReach + thread; row < last_row + kReach; row += threads) {
      table_[row] = clamp(row, height) % cut.ring * pitch_of(cut.runs);
    }
    __syncthreads();
  }

  // Write zeros, for columns that are never written.
  __device__ void clear() const {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = thread; i < size_; i += threads) memory_[i] = 0.0f;
    __syncthreads();
  }

  // A row of the map; for rows beyond the image, the nearest one inside.
  __device__ float* row(int index) const { return memory_ + table_[index]; }

  // C of the tokens of a row.
  __device__ float* C(int index) const { return row(index) + columns_ * kChannels; }

 private:
  static __host__ __device__ int pitch_of(int runs) {
    // Runs in neighbouring rows use different banks.
    return (runs * kRun + 2 * kReach) * kChannels + divide_up(runs * kRun, kWarp) * kWarp;
  }
  static __host__ __device__ int table_size(const Cut& cut) { return cut.band_rows + 2 * kReach; }

  int columns_, size_;
  float* memory_;
  int* table_;
};

// Calls body(std::true_type()) if all columns of all runs exist, as with images of 224x224, since this saves
// instructions; else body(std::false_type()).
template <class Body>
void with_whole_runs(const Map& map, const Cut& cut, Body&& body) {
  cut.strips.count == 1 && map.width % kRun == 0 ? body(std::true_type()) : body(std::false_type());
}

// The place of a block and of its threads, and the recurrence at the tokens of a run.
template <class T, class V, bool kWhole>
class Walk {
 public:
  // Floats of shared memory, including taps, besides rings.
  static size_t shared_floats(int rank, const Cut& cut) {
    const int runs = threads_of<V>(cut).y, warps = runs * kLanes<V> / kWarp;
    return (padded(rank) + kTaps) * kChannels + runs * run_floats(rank) + (2 * 2 * warps + 2) * kChannels;
  }

  __device__ Walk(const Recurrence& recurrence, const Cut& cut, const float* taps_of_map, float*& memory)
      : recurrence(recurrence), map(recurrence.map), cut(cut) {
    const int groups = divide_up(map.dim, kChannels), rank = recurrence.rank;
    group = blockIdx.x % groups;
    part = blockIdx.x / groups;
    const int strips = kWhole ? 1 : cut.strips.count;
    strip = part % strips;
    const int band = part / strips % cut.bands;
    image = part / strips / cut.bands;
    first_row = band * cut.band_rows;
    last_row = min(first_row + cut.band_rows, map.height);
    const bool undivided = strips == 1;
    first_output = undivided ? 0 : strip * cut.strips.columns;
    last_output = undivided ? map.width : min(first_output + cut.strips.columns, map.width);
    first_column = undivided ? 0 : cut.strips.start(strip);
    last_column = undivided ? map.width : min(last_output + kReach, map.width);
    first_token_ = static_cast<unsigned>(image * map.height * map.width);
    u = image_of(static_cast<const T*>(recurrence.u.data), map.dim);
    projections_ = image_of(static_cast<const T*>(recurrence.projection.data), rank + 2);

    const int own_channel = group * kChannels + threadIdx.x * kChannelsOf<V>;
    has_channel = own_channel < map.dim;
    channel = min(own_channel, map.dim - kChannelsOf<V>);
    row_of_chunk = threadIdx.y / cut.runs;
    run = threadIdx.y % cut.runs;
    column = kWhole ? run * kRun : min(first_column + run * kRun, last_column - 1);
    columns = kWhole ? kRun : clamp(last_column - first_column - run * kRun, kRun + 1);
    last_ = max(columns - 1, 0);
    inverse_ = (1 << kInverseBits) / (rank % 2 == 0 ? rank / 2 + 1 : rank + 2) + 1;

    rate = each(rate_of, weight(recurrence.A_log));
    bias_ = V(kLog2E) * weight(recurrence.step_bias);
    warps_ = blockDim.y * kLanes<V> / kWarp;
    warp_ = threadIdx.y * kLanes<V> / kWarp;
    V* own_taps = reinterpret_cast<V*>(take(memory, kTaps * kChannels)) + threadIdx.x;
    for (int t = threadIdx.y; t < kTaps; t += blockDim.y) {
      own_taps[t * kLanes<V>] = weight(taps_of_map + static_cast<int64_t>(t) * map.dim);
    }
    taps = own_taps;
    carries_ = take(memory, 2 * kChannels);
    weights_ = take(memory, padded(rank) * kChannels);
    projection_ = take(memory, blockDim.y * run_floats(rank)) + threadIdx.y * run_floats(rank);
    segments_ = take(memory, 2 * 2 * warps_ * kChannels);
    const int thread = threadIdx.y * kLanes<V> + threadIdx.x, threads = blockDim.y * kLanes<V>;
    for (int i = thread; i < padded(rank) * kChannels; i += threads) {
      const int r = i / kChannels, own = min(group * kChannels + i % kChannels, map.dim - 1);
      weights_[i] = r < rank ? kLog2E * recurrence.step_weight[static_cast<int64_t>(own) * rank + r] : 0.0f;
    }
    for (int i = thread; i < 2 * kChannels; i += threads) carries_[i] = 0.0f;
    __syncthreads();
  }

  // Weights of this thread's channels.
  __device__ V weight(const float* weights) const { return per_channel<V>(weights + channel); }

  // The image of this block in maps with `channels` channels.
  template <class X>
  __device__ X* image_of(X* maps, int channels) const {
    return maps + static_cast<int64_t>(first_token_) * channels;
  }

  // A token of the image, and the thread's first channel there.
  __device__ unsigned token(int row, int column) const { return row * map.width + column; }
  __device__ unsigned element(int row, int column) const { return token(row, column) * map.dim + channel; }

  // Calls body(k, pointer) for this run of a row of an image, with its last column in place of missing ones. Offsets in
  // 32 bits take fewer instructions and registers.
  template <class X, class Body>
  __device__ __forceinline__ void over_run(X* of_image, int row, const Body& body) const {
    const unsigned step = map.dim * sizeof(X);
    X* const first = at_byte(of_image, element(row, column) * static_cast<unsigned>(sizeof(X)));
    if constexpr (kWhole) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) body(k, at_byte(first, k * step));
    } else {
      unsigned offset = 0;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        body(k, at_byte(first, offset));
        if (k < last_) offset += step;
      }
    }
  }

  template <class X>
  __device__ __forceinline__ void load_run(Raw<V, X> (&values)[kRun], const X* of_image, int row) const {
    over_run(of_image, row, [&](int k, const X* source) { values[k] = load_raw<V>(source); });
  }

  // The same for half precision, without registers: `fetched` returns the value of column k, after wait_for_copies().
  // Overwrites B and C.
  __device__ __forceinline__ void fetch_run(const T* of_image, int row) const {
    over_run(of_image, row, [&](int k, const T* source) {
      copy_async(fetched_run() + k * kLanes<V>, reinterpret_cast<const Raw<V, T>*>(source));
    });
  }
  __device__ V fetched(int k) const { return fetched_run()[k * kLanes<V>].value(); }

  // Move what `project` and loads of u will read of a row to the L2 cache.
  __device__ __forceinline__ void prefetch(int row) const {
    const int lane = threadIdx.x;
    const void* address = u + token(row, column + min(lane, last_)) * map.dim + group * kChannels;
    if (lane == kLanes<V> - 1) address = projections_ + token(row, column) * (recurrence.rank + 2);
    if (lane < kRun || lane == kLanes<V> - 1) prefetch_to_cache(address);
  }

  // C at the tokens of this run in a row.
  __device__ __forceinline__ void load_C(float (&C)[kRun], int row) const {
    const int channels = recurrence.rank + 2;
    const T* source = projections_ + token(row, column) * channels + channels - 1;
#pragma unroll
    for (int k = 0; k < kRun; ++k) C[k] = load(source + (kWhole ? k : min(k, last_)) * channels);
  }

  // Deltas before softplus, in units of ln 2, at the tokens of this run in a row. B and C are kept until the next call.
  __device__ __forceinline__ void project(int row, V (&steps)[kRun]) const {
    const int rank = recurrence.rank, pitch = pitch_of(rank);
    const T* source = projections_ + token(row, column) * (rank + 2);
    const int count = (last_ + 1) * (rank + 2);
    __syncwarp();  // the previous values have been read
    if (rank % 2 == 0) {
      constexpr int kBatch = kWarp / kLanes<V>;  // loads at a time
      const int words = count / 2;
#pragma unroll 1
      for (int first = threadIdx.x; first < words; first += kBatch * kLanes<V>) {
        Raw<Pair, T> batch[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) batch[j] = load_raw<Pair>(source + 2 * min(first + j * kLanes<V>, words - 1));
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = first + j * kLanes<V>;
          const int k = column_of(i);
          batch[j].settle();
          if (i < words) *reinterpret_cast<Pair*>(projection_ + 2 * i + k * (pitch - rank - 2)) = batch[j].value();
        }
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += kLanes<V>) {
        projection_[i + column_of(i) * (pitch - rank - 2)] = load(source + i);
      }
    }
    if (padded(rank) > rank + 2 && threadIdx.x < kRun) projection_[threadIdx.x * pitch + rank + 2] = 0.0f;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kRun; ++k) steps[k] = bias_;
    int r = 0;
#pragma unroll 1
    do {
      V weights[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        weights[j] = reinterpret_cast<const V*>(weights_ + (r + j) * kChannels)[threadIdx.x];
      }
      const float* values_of_token = projection_ + r;
#pragma unroll
      for (int k = 0; k < kRun; ++k, values_of_token += pitch) {
        const float4 values = *reinterpret_cast<const float4*>(values_of_token);
        steps[k] += weights[0] * values.x;
        steps[k] += weights[1] * values.y;
        steps[k] += weights[2] * values.z;
        steps[k] += weights[3] * values.w;
      }
      r += kVector;
    } while (r < rank);
  }

  // Deltas in units of ln 2, and decays. Columns from `count` on keep the state.
  __device__ __forceinline__ void discretise(const V (&steps)[kRun], int count, V (&deltas)[kRun],
                                             V (&decays)[kRun]) const {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      V delta = each(softplus_base2, steps[k]);
      settle(delta);
      deltas[k] = k < count ? delta : V(0.0f);
      decays[k] = each(exp2_fast, deltas[k] * rate);
    }
  }

  // B and C at the tokens of this run: lane k of the run has those of column k.
  __device__ float own_B() const { return own_projection(0); }
  __device__ float own_C() const { return own_projection(1); }

  // The value of the lane that has column k, with the whole warp taking part.
  __device__ static float of_column(float own, int k) { return __shfl_sync(kAllLanes, own, k, kLanes<V>); }

  // The state before this run, given the map of each run and the state before the first one; with kReverse, runs are in
  // reverse order. Contains a barrier. The state after all runs goes to `next_carry`, if that is not null.
  template <bool kReverse>
  __device__ __forceinline__ V enter(AffineMap<V> own, const float* carry, float* next_carry) const {
    constexpr int kRunsOfWarp = kWarp / kLanes<V>;
    const int run_of_warp = threadIdx.y % kRunsOfWarp, rank = kReverse ? kRunsOfWarp - 1 - run_of_warp : run_of_warp;
    constexpr int kDistance = kReverse ? -kLanes<V> : kLanes<V>;
    AffineMap<V> upto = own;  // the run and those before it in the warp
#pragma unroll
    for (int runs = 1; runs < kRunsOfWarp; runs *= 2) {
      const AffineMap<V> earlier = shift(upto, runs * kDistance);
      if (rank >= runs) upto = earlier.then(upto);
    }
    const AffineMap<V> before = shift(upto, kDistance);
    auto* segments = reinterpret_cast<AffineMap<V>*>(segments_) + (kReverse ? warps_ * kLanes<V> : 0) + threadIdx.x;
    const int position = kReverse ? warps_ - 1 - warp_ : warp_;
    if (rank == kRunsOfWarp - 1) segments[position * kLanes<V>] = upto;
    __syncthreads();
    V state = carry == nullptr ? V(0.0f) : reinterpret_cast<const V*>(carry)[threadIdx.x];
#pragma unroll 2
    for (int i = 0; i < position; ++i) state = segments[i * kLanes<V>](state);
    if (next_carry != nullptr && rank == kRunsOfWarp - 1 && position == warps_ - 1) {
      reinterpret_cast<V*>(next_carry)[threadIdx.x] = upto(state);
    }
    return rank == 0 ? state : before(state);
  }

  __device__ float* carry(unsigned chunk) const { return carries_ + chunk % 2 * kChannels; }

  const Recurrence& recurrence;
  const Map& map;
  const Cut& cut;
  int64_t image;
  const T* u;                      // of the image
  int group, part;                 // of the channels; of everything else
  int strip, first_row, last_row;  // rows of the results
  int first_output, last_output;   // columns of the results
  int first_column, last_column;   // columns of the states
  int channel;                     // the first one; valid in every lane
  bool has_channel;                // whether it belongs to this lane
  int row_of_chunk, run;           // of this thread
  int column, columns;             // the run's first column, and how many exist
  V rate;                          // -exp(A_log)
  const V* taps;  // tap t of this thread's channels is at t * kLanes<V>, in shared memory, since registers are scarce

 private:
  // Of a token in shared memory: r, B and C, padded to whole vectors.
  static __host__ __device__ int pitch_of(int rank) { return padded(rank + 2); }
  // Of a run: the projection of its tokens, or fetched values in half precision.
  static __host__ __device__ int run_floats(int rank) {
    constexpr int kFetched = sizeof(T) == 2 ? kRun * kChannels / 2 : 0;
    const int projected = kRun * pitch_of(rank);
    return projected < kFetched ? kFetched : projected;
  }
  // The column of the i-th word of a run's projection, which is a pair of values if their number is even. Exact, since
  // there are at most 7 * 130 values.
  __device__ int column_of(int i) const { return i * inverse_ >> kInverseBits; }
  static constexpr int kInverseBits = 20;

  __device__ float own_projection(int i) const {
    return projection_[min(static_cast<int>(threadIdx.x), last_) * pitch_of(recurrence.rank) + recurrence.rank + i];
  }
  __device__ Raw<V, T>* fetched_run() const { return reinterpret_cast<Raw<V, T>*>(projection_) + threadIdx.x; }

  unsigned first_token_;  // of the image
  const T* projections_;
  int last_, warp_, warps_, inverse_;
  V bias_;
  float *weights_, *projection_, *segments_, *carries_;  // (padded rank, channels); (run, pitch); maps; states
};

// The sums of the values over all channels of a run; returns the one of column k to lane k, or 2 k and 2 k + 1.
template <class V>
__device__ __forceinline__ float sum_over_channels(const V (&values)[kRun]) {
  static_assert(kRun == 7 && kLanes<V> >= 8);
  const unsigned lane = threadIdx.x * 8 / kLanes<V>;
  constexpr int kStep = kLanes<V> / 8;
  float four[4], two[2];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float low = sum_of(values[k]), high = k == 3 ? 0.0f : sum_of(values[(k + 4) % kRun]);
    four[k] = (lane & 4 ? high : low) + __shfl_xor_sync(kAllLanes, lane & 4 ? low : high, 4 * kStep);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float low = four[k], high = four[k + 2];
    two[k] = (lane & 2 ? high : low) + __shfl_xor_sync(kAllLanes, lane & 2 ? low : high, 2 * kStep);
  }
  float sum = (lane & 1 ? two[1] : two[0]) + __shfl_xor_sync(kAllLanes, lane & 1 ? two[0] : two[1], kStep);
#pragma unroll
  for (int distance = kStep / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

}  // namespace spatial_mamba
