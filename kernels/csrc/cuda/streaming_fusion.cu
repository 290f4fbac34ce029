// State fusion for 3x3 kernels with dilations 1, 3 and 5: blocks move down the rows of a map, so that each element is
// read about once. The fused states, the adjoint, and the gradients of the taps.
#include <algorithm>

#include "stencil.cuh"

namespace spatial_mamba {
namespace {

constexpr int kMaxSegments = 16;  // threads along a row
constexpr int kMaxThreads = kChannels * kMaxSegments;
constexpr int kMaxColumns = kMaxSegments * kRunOfColumns;
constexpr int kMaxLoads = kRunOfColumns + kReach;  // per thread and row: its columns, and a part of 2 kReach more

// The rows and columns that the taps read, in their order.
constexpr int kOffsets[kTaps][2] = {{-5, -5}, {-5, 0}, {-5, 5}, {-3, -3}, {-3, 0}, {-3, 3}, {-1, -1}, {-1, 0}, {-1, 1},
                                    {0, -5},  {0, -3}, {0, -1}, {0, 0},   {0, 1},  {0, 3},  {0, 5},   {1, -1}, {1, 0},
                                    {1, 1},   {3, -3}, {3, 0},  {3, 3},   {5, -5}, {5, 0},  {5, 5}};

// How images are divided among blocks: bands of rows, strips of columns, groups of kChannels channels.
struct Tiling {
  int bands, band_rows, strips, strip_columns;

  // Strips of at most `columns` columns.
  Tiling(const Map& map, int columns) {
    strip_columns = divide_up(map.width, divide_up(map.width, columns));
    strips = divide_up(map.width, strip_columns);
    band_rows = divide_up(map.height, bands_for(map.batch * strips * divide_up(map.dim, kChannels), map.height));
    bands = divide_up(map.height, band_rows);
  }

  dim3 grid(const Map& map) const {
    return dim3(static_cast<unsigned>(map.batch * bands * strips), divide_up(map.dim, kChannels));
  }
};

// The rows and columns of a block's results, and a thread's channel.
struct Place {
  int64_t image_token;  // the image's first, counted over all images
  int first_row, last_row, first_column, last_column;
  int channel;
  bool has_channel;

  __device__ Place(const Map& map, const Tiling& tiling) {
    const int strip = blockIdx.x % tiling.strips, band = blockIdx.x / tiling.strips % tiling.bands;
    image_token = static_cast<int64_t>(blockIdx.x / tiling.strips / tiling.bands) * map.height * map.width;
    first_row = band * tiling.band_rows;
    last_row = min(first_row + tiling.band_rows, map.height);
    first_column = strip * tiling.strip_columns;
    last_column = min(first_column + tiling.strip_columns, map.width);
    const int own_channel = blockIdx.y * kChannels + threadIdx.x;
    has_channel = own_channel < map.dim;
    channel = min(own_channel, map.dim - 1);
  }

  __device__ bool has_row(int row) const { return row >= first_row && row < last_row; }
  __device__ bool has_column(int column) const { return column >= first_column && column < last_column; }

  // The first token of a row.
  __device__ int64_t token(const Map& map, int row) const {
    return image_token + static_cast<int64_t>(row) * map.width;
  }

  // This channel at the first token of a row.
  template <class T>
  __device__ T* line(const Map& map, T* data, int row) const {
    return data + token(map, row) * map.dim + channel;
  }
};

// States; outside the image, the nearest one inside.
template <class H>
struct States {
  const Map& map;
  const H* h;

  struct Line {
    const H* first;
    int width, dim;

    __device__ float operator[](int column) const {
      return load(first + static_cast<int64_t>(clamp(column, width)) * dim);
    }
  };

  __device__ Line line(const Place& place, int row) const {
    return {place.line(map, h, clamp(row, map.height)), map.width, map.dim};
  }
};

// Gradients of fused states, C grad or grad, zero outside the image.
template <class G>
struct Gradients {
  const Map& map;
  const G* grad;
  const float* C;

  struct Line {
    const G* first;
    const float* C;  // may be null
    int width, dim;  // the width is zero for rows outside

    __device__ float operator[](int column) const {
      if (column < 0 || column >= width) return 0.0f;
      const float value = load(first + static_cast<int64_t>(column) * dim);
      return C == nullptr ? value : value * C[column];
    }
  };

  __device__ Line line(const Place& place, int row) const {
    const bool inside = row >= 0 && row < map.height;
    const int existing = clamp(row, map.height);
    return {place.line(map, grad, existing), C == nullptr ? nullptr : C + place.token(map, existing),
            inside ? map.width : 0, map.dim};
  }
};

// Loads rows of a source into shared memory, one ahead of their use; columns start kReach before `first_column`.
template <class Source>
class Rows {
 public:
  static size_t shared_floats(int segments) { return 2 * (segments * kRunOfColumns + 2 * kReach) * kPitch; }

  __device__ Rows(const Source& source, const Place& place, int first_column, float* memory)
      : source_(source),
        place_(place),
        start_(first_column - kReach),
        columns_(blockDim.y * kRunOfColumns + 2 * kReach),
        memory_(memory) {}

  // Visit the rows from first to last - 1 in pairs of calls visit(i, window, opposite, same), between which the two
  // objects of opposite and same parity are exchanged.
  template <class Parity, class Visit>
  __device__ __forceinline__ void walk(int first, int last, Parity& even, Parity& odd, const Visit& visit) {
    begin(first);
    for (int i = first; i < last; i += 2) {
      step(i, last, even, odd, visit);
      if (i + 1 < last) step(i + 1, last, odd, even, visit);
    }
  }

 private:
  template <class Parity, class Visit>
  __device__ __forceinline__ void step(int i, int last, Parity& opposite, Parity& same, const Visit& visit) {
    float* row = memory_ + (i & 1) * columns_ * kPitch;
#pragma unroll
    for (int n = 0; n < kMaxLoads; ++n) {
      const int slot = threadIdx.y + n * blockDim.y;
      if (slot < columns_) row[slot * kPitch + threadIdx.x] = loaded_[n];
    }
    __syncthreads();  // the row that had this place was read before the previous barrier
    if (i + 1 < last) begin(i + 1);
    float window[kWindow];
    load_window(row, window);
    visit(i, window, opposite, same);
  }

  __device__ __forceinline__ void begin(int row) {
    const auto line = source_.line(place_, row);
#pragma unroll
    for (int n = 0; n < kMaxLoads; ++n) {
      const int slot = threadIdx.y + n * blockDim.y;
      if (slot < columns_) loaded_[n] = line[start_ + slot];
    }
  }

  const Source& source_;
  const Place& place_;
  int start_, columns_;
  float* memory_;
  float loaded_[kMaxLoads];
};

template <class H>
__global__ void __launch_bounds__(kMaxThreads, 2)
    stream_fuse_kernel(const __grid_constant__ Map map, const __grid_constant__ Tiling tiling, const H* h,
                       const float* taps, H* out) {
  const Place place(map, tiling);
  const Stencil stencil(taps + place.channel, map.dim, false);
  const States<H> states{map, h};
  Rows<States<H>> rows(states, place, place.first_column, shared_memory);
  const int column = place.first_column + static_cast<int>(threadIdx.y) * kRunOfColumns;
  Sums even, odd;
  rows.walk(place.first_row - kReach, place.last_row + kReach, even, odd,
            [&](int i, const float (&window)[kWindow], Sums& opposite, Sums& same) {
              float fused[kRunOfColumns];
              if (place.has_row(i)) {  // sums of rows outside the band are never stored
                stencil.contribute(i, [](int) { return true; }, window, opposite, same, fused);
              } else {
                stencil.contribute(i, [&](int row) { return place.has_row(row); }, window, opposite, same, fused);
              }
              if (!place.has_row(i - kReach) || !place.has_channel) return;
              H* line = place.line(map, out, i - kReach);
#pragma unroll
              for (int k = 0; k < kRunOfColumns; ++k) {
                if (place.has_column(column + k)) store(line + static_cast<int64_t>(column + k) * map.dim, fused[k]);
              }
            });
}

// The mirrored stencil, over the image and the kReach rows and columns around it, whose states repeat the edge: their
// gradients are added to the edge.
template <class G, class H>
__global__ void __launch_bounds__(kMaxThreads, 2)
    stream_adjoint_kernel(const __grid_constant__ Map map, const __grid_constant__ Tiling tiling, const G* grad,
                          const float* C, const float* taps, H* grad_h) {
  const Place place(map, tiling);
  const Stencil stencil(taps + place.channel, map.dim, true);
  const Gradients<G> gradients{map, grad, C};
  const int first_row = place.first_row == 0 ? -kReach : place.first_row;
  const int last_row = place.last_row == map.height ? map.height + kReach : place.last_row;
  const int first_column = place.first_column == 0 ? -kReach : place.first_column;
  const int column = first_column + static_cast<int>(threadIdx.y) * kRunOfColumns;

  float* memory = shared_memory;
  float* beyond = take(memory, 2 * kReach * kChannels);  // results for the columns left and right of the image
  Rows<Gradients<G>> rows(gradients, place, first_column, memory);
  float results[kRunOfColumns] = {};
  Sums even, odd;
  rows.walk(
      first_row - kReach, last_row + kReach, even, odd,
      [&](int i, const float (&window)[kWindow], Sums& opposite, Sums& same) {
        float done[kRunOfColumns];
        const auto needed = [&](int row) { return i >= 0 && i < map.height && row >= first_row && row < last_row; };
        stencil.contribute(i, needed, window, opposite, same, done);
        const int row = i - kReach;
        if (row < first_row) return;
#pragma unroll
        for (int k = 0; k < kRunOfColumns; ++k) results[k] += done[k];
        const bool more = row + 1 < last_row && clamp(row + 1, map.height) == clamp(row, map.height);
        if (more) return;  // the next row belongs to the same edge

#pragma unroll
        for (int k = 0; k < kRunOfColumns; ++k) {
          const int left = column + k + kReach, right = column + k - map.width;
          if (column + k < 0) beyond[left * kChannels + threadIdx.x] = results[k];
          if (right >= 0 && right < kReach) beyond[(kReach + right) * kChannels + threadIdx.x] = results[k];
        }
        __syncthreads();  // the barrier of the next row comes before these are written again
#pragma unroll
        for (int k = 0; k < kRunOfColumns; ++k) {
          const int own = column + k;
          for (int j = 0; own == 0 && j < kReach; ++j) results[k] += beyond[j * kChannels + threadIdx.x];
          for (int j = kReach; own == map.width - 1 && j < 2 * kReach; ++j) {
            results[k] += beyond[j * kChannels + threadIdx.x];
          }
          if (place.has_channel && place.has_column(own)) {
            store(place.line(map, grad_h, clamp(row, map.height)) + static_cast<int64_t>(own) * map.dim, results[k]);
          }
          results[k] = 0.0f;
        }
      });
}

// Gradients of the fused rows i - 5 to i + 5, row by row like Sums, times row i of the states.
template <class G, class H>
__global__ void __launch_bounds__(kMaxThreads, 2)
    stream_tap_gradients_kernel(const __grid_constant__ Map map, const __grid_constant__ Tiling tiling, const G* grad,
                                const float* C, const H* h, float* grad_taps) {
  const Place place(map, tiling);
  const States<H> states{map, h};
  const Gradients<G> gradients{map, grad, C};
  Rows<States<H>> rows(states, place, place.first_column, shared_memory);
  const int column = place.first_column + static_cast<int>(threadIdx.y) * kRunOfColumns;
  float sums[kTaps] = {};
  Sums even, odd;
  rows.walk(place.first_row - kReach, place.last_row + kReach, even, odd,
            [&](int i, const float (&window)[kWindow], Sums& opposite, Sums& same) {
              float (&above)[5][kRunOfColumns] = opposite.rows;
              float entering[kRunOfColumns];
              const auto line = gradients.line(place, i + kReach);
#pragma unroll
              for (int k = 0; k < kRunOfColumns; ++k) {
                const bool own = place.has_row(i + kReach) && place.has_column(column + k);
                entering[k] = own ? line[column + k] : 0.0f;
              }
              const auto add = [&](int tap, int column_offset, const float (&of_row)[kRunOfColumns]) {
#pragma unroll
                for (int k = 0; k < kRunOfColumns; ++k) sums[tap] += of_row[k] * window[k + kReach + column_offset];
              };
#pragma unroll
              for (int t = 0; t < 7; ++t) add(9 + t, tap_column(0, t), same.rows[2]);
#pragma unroll
              for (int t = 0; t < 3; ++t) {
                add(22 + t, tap_column(5, t), above[0]);
                add(19 + t, tap_column(3, t), above[1]);
                add(16 + t, tap_column(1, t), above[2]);
                add(6 + t, tap_column(1, t), above[3]);
                add(3 + t, tap_column(3, t), above[4]);
                add(t, tap_column(5, t), entering);
              }
#pragma unroll
              for (int k = 0; k < kRunOfColumns; ++k) {
#pragma unroll
                for (int n = 0; n < 4; ++n) above[n][k] = above[n + 1][k];
                above[4][k] = entering[k];
              }
            });

  float* of_segments = shared_memory;  // (segments, taps, channels)
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTaps; ++t) of_segments[(threadIdx.y * kTaps + t) * kChannels + threadIdx.x] = sums[t];
  __syncthreads();
  for (int t = threadIdx.y; t < kTaps && place.has_channel; t += blockDim.y) {
    float sum = 0.0f;
    for (unsigned segment = 0; segment < blockDim.y; ++segment) {
      sum += of_segments[(segment * kTaps + t) * kChannels + threadIdx.x];
    }
    grad_taps[(static_cast<int64_t>(blockIdx.x) * kTaps + t) * map.dim + place.channel] = sum;
  }
}

}  // namespace

bool streaming_serves(const Offsets& offsets) {
  if (offsets.count != kTaps) return false;
  for (int t = 0; t < kTaps; ++t) {
    if (offsets.row[t] != kOffsets[t][0] || offsets.column[t] != kOffsets[t][1]) return false;
  }
  return true;
}

void stream_fuse(const Map& map, Activations h, const float* taps, Activations fused, cudaStream_t stream) {
  const Tiling tiling(map, kMaxColumns);
  const int segments = segments_for(tiling.strip_columns);
  with_type(h, [&](auto* states) {
    using H = Element<decltype(states)>;
    launch("stream_fuse", stream_fuse_kernel<H>, tiling.grid(map), dim3(kChannels, segments),
           Rows<States<H>>::shared_floats(segments), stream, map, tiling, states, taps, static_cast<H*>(fused.data));
  });
}

void stream_adjoint(const Map& map, Activations grad, const float* C, const float* taps, Activations grad_h,
                    cudaStream_t stream) {
  const Tiling tiling(map, kMaxColumns - 2 * kReach);
  const int segments = segments_for(tiling.strip_columns + (tiling.strips == 1 ? 2 * kReach : kReach));
  with_types(grad, grad_h, [&](auto* grad_fused, auto* out) {
    using G = Element<decltype(grad_fused)>;
    using H = Element<decltype(out)>;
    launch("stream_adjoint", stream_adjoint_kernel<G, H>, tiling.grid(map), dim3(kChannels, segments),
           2 * kReach * kChannels + Rows<Gradients<G>>::shared_floats(segments), stream, map, tiling, grad_fused, C,
           taps, out);
  });
}

int stream_tap_gradients_partial_sums(const Map& map) { return static_cast<int>(Tiling(map, kMaxColumns).grid(map).x); }

void stream_tap_gradients(const Map& map, Activations grad, const float* C, Activations h, float* grad_taps,
                          cudaStream_t stream) {
  const Tiling tiling(map, kMaxColumns);
  const int segments = segments_for(tiling.strip_columns);
  with_types(grad, h, [&](auto* grad_fused, auto* states) {
    using G = Element<decltype(grad_fused)>;
    using H = Element<decltype(states)>;
    const size_t shared_floats =
        std::max<size_t>(Rows<States<H>>::shared_floats(segments), segments * kTaps * kChannels);
    launch("stream_tap_gradients", stream_tap_gradients_kernel<G, H>, tiling.grid(map), dim3(kChannels, segments),
           shared_floats, stream, map, tiling, grad_fused, C, states, grad_taps);
  });
}

}  // namespace spatial_mamba
