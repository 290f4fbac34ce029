// The interface between operators.cpp and the kernels: raw pointers, sizes and a stream, so that neither side includes
// the headers of the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include <cuda_runtime_api.h>

#ifdef __CUDACC__
#define SPATIAL_MAMBA_HOST_DEVICE __host__ __device__
#else
#define SPATIAL_MAMBA_HOST_DEVICE
#endif

namespace spatial_mamba {

enum class Scalar { float32, bfloat16, float16 };

// A buffer of a type of activations. States are always float32, and so are weights that are given as pointers.
struct Activations {
  void* data;
  Scalar type;
};

// Whether maps can be read and written in vectors of `channels`: all data, and the numbers of channels and strides.
inline bool are_aligned(int channels, std::initializer_list<int64_t> sizes, std::initializer_list<Activations> maps) {
  return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size % channels == 0; }) &&
         std::all_of(maps.begin(), maps.end(), [&](const Activations& x) {
           return reinterpret_cast<uintptr_t>(x.data) % (channels * (x.type == Scalar::float32 ? 4 : 2)) == 0;
         });
}

// Maps (batch, H, W, dim), channels last.
struct Map {
  int64_t batch;
  int height, width, dim;
};

// Number of partial sums over the tokens of a map: enough blocks to fill a GPU.
int partial_sums(const Map& map);

// result[i result_stride] = the sum of parts[part stride + i] over all parts, for i < size.
struct PartialSums {
  const float* parts;
  int count;
  int64_t size, stride;
  float* result;
  int64_t result_stride;
};

constexpr int kMostPartialSums = 8;
void add_partial_sums(const PartialSums* sums, int count, cudaStream_t stream);

// --- State fusion, with replicate padding ----------------------------------------------------------------------------

constexpr int kMaxTaps = 448;  // they are kernel arguments, which are limited to 4 KiB

struct Offsets {
  int count;
  int row[kMaxTaps];
  int column[kMaxTaps];
};

// fused = sum of taps (T, dim) times neighbours of h.
void fuse(const Map& map, Activations h, const float* taps, const Offsets& offsets, Activations fused,
          cudaStream_t stream);

// y = C fused + D u, from float32 states h; C (batch, H, W).
void fuse_and_read_out(const Map& map, const float* h, const float* taps, const Offsets& offsets, const float* C,
                       Activations u, const float* D, Activations y, cudaStream_t stream);

// grad_C (read_out_partial_sums, batch, H, W), to be summed over its first dimension: grad_y times the fused states.
int read_out_partial_sums(const Map& map);
void read_out_gradient(const Map& map, Activations grad_y, const float* h, const float* taps, const Offsets& offsets,
                       float* grad_C, cudaStream_t stream);

// The gradient of the fused states is grad, or C grad if C is given.
void fuse_adjoint(const Map& map, Activations grad, const float* C, const float* taps, const Offsets& offsets,
                  Activations grad_h, cudaStream_t stream);

// grad_taps (tap_partial_sums, T, dim), to be summed over its first dimension.
int tap_partial_sums(const Map& map, const Offsets& offsets);
void tap_gradients(const Map& map, Activations grad, const float* C, Activations h, const Offsets& offsets,
                   float* grad_taps, cudaStream_t stream);

// The same for the offsets of 3x3 kernels with dilations 1, 3 and 5, which `streaming_serves` recognises. The functions
// above call these.
bool streaming_serves(const Offsets& offsets);
void stream_fuse(const Map& map, Activations h, const float* taps, Activations fused, cudaStream_t stream);
void stream_adjoint(const Map& map, Activations grad, const float* C, const float* taps, Activations grad_h,
                    cudaStream_t stream);
int stream_tap_gradients_partial_sums(const Map& map);
void stream_tap_gradients(const Map& map, Activations grad, const float* C, Activations h, float* grad_taps,
                          cudaStream_t stream);

// --- Structure-aware scan: the recurrence in row-major order, one state per channel ----------------------------------

struct Recurrence {
  Map map;
  Activations u, projection;  // (batch, H, W, dim) and (batch, H, W, R + 2), of one type
  const float *step_weight, *step_bias, *A_log, *D;
  int rank;
};

// A division of all rows into strips: outputs of `columns` columns each, fewer in the last. A strip starts earlier, by
// the columns to the left that its outputs depend on.
struct Strips {
  int count, columns, reach;

  SPATIAL_MAMBA_HOST_DEVICE int start(int strip) const { return strip == 0 ? 0 : strip * columns - reach; }
};

constexpr Strips kWholeRows = {1, 0, 0};

// states (batch, H, strips, dim): the state before the first token of each strip in each row; for whole rows these are
// the row_states (batch, H, dim). piece_maps: scratch memory of twice that size.
void find_states(const Recurrence& recurrence, const Strips& strips, float* piece_maps, float* states,
                 cudaStream_t stream);

// All states h (batch, H, W, dim) from those before each row.
void restore_states(const Recurrence& recurrence, const float* row_states, float* h, cudaStream_t stream);

// A division of images among blocks and threads (chunks.cuh): into strips and bands of rows, which are independent
// given the states before each strip. A single strip and band needs no states, since the state is carried along.
struct Cut {
  Strips strips;
  int bands, band_rows;
  int runs, rows;  // runs of columns along a row of a strip, rows of a chunk
  int ring;        // rows in shared memory

  bool whole() const { return strips.count == 1 && bands == 1; }
};

Cut chunk_scan_cut(const Map& map);

// Whether shapes, alignment and the shared memory of the GPU suit `chunk_scan` and `read_out_gradients`, whose other
// argument is y or grad_y.
bool chunk_scan_serves(const Recurrence& recurrence, Activations other);

// y = C fused + D u in one pass over the image, if `streaming_serves`. `states`: of the strips, or null if the image is
// not divided; then row_states are written.
void chunk_scan(const Recurrence& recurrence, const float* taps, const float* states, float* row_states, Activations y,
                cudaStream_t stream);

Cut read_out_gradients_cut(const Map& map);

// The gradients of C and of the taps in one pass: grad_C (ceil(dim / 16), batch, H, W) and grad_taps (parts of the cut,
// T, dim), each to be summed over its first dimension. `states`: of the strips.
void read_out_gradients(const Recurrence& recurrence, Activations grad_y, const float* taps, const float* states,
                        float* grad_C, float* grad_taps, cudaStream_t stream);

struct RecurrenceGradients {
  Activations u;
  float* step;       // (batch, H, W, dim), of delta before softplus
  float* B;          // (ceil(dim / channels), batch, H, W), to be summed over its first dimension
  float *A_log, *D;  // (partial sums, dim), likewise
};

// The gradients through state fusion, the recurrence and the skip connection D u in one pass, where this serves: with
// 16 channels per sum for B, and one partial sum per image.
bool chunk_gradients_serve(const Recurrence& recurrence, Activations grad_y);
void chunk_gradients(const Recurrence& recurrence, Activations grad_y, const float* taps, const float* row_states,
                     const RecurrenceGradients& gradients, cudaStream_t stream);

// The same without the fusion, for any map; on entry `gradients.step` is the gradient of h. There are 32 channels per
// sum for B, and `partial_sums`. row_maps and row_carries are scratch memory, like piece_maps and row_states above.
void recurrence_gradients(const Recurrence& recurrence, Activations grad_y, const float* h, const float* row_states,
                          float* row_maps, float* row_carries, const RecurrenceGradients& gradients,
                          cudaStream_t stream);

// --- Depthwise 3x3 convolution, with zero padding --------------------------------------------------------------------

struct DepthwiseConv {
  Map map;
  Activations x;  // (batch, H, W, dim), with `stride` elements between tokens
  int64_t stride;
  const float *weight, *bias;     // (dim, 9); (dim,) or null
  bool silu, residual, mirrored;  // followed by SiLU; plus x; with mirrored kernels, as in the adjoint
};

void depthwise_conv(const DepthwiseConv& conv, Activations out, int64_t out_stride, cudaStream_t stream);

// sums (depthwise_conv_partial_sums, 10 dim), to be summed over its first dimension: the gradients of the weight, then
// of the bias. grad_convolved: the gradient before the SiLU, if there is one.
int depthwise_conv_partial_sums(const Map& map);
void depthwise_conv_gradients(const DepthwiseConv& conv, Activations grad_out, Activations grad_convolved, float* sums,
                              cudaStream_t stream);

// --- Downsampling: ReLU, depthwise 3x3 convolution of stride 2 with zero padding, ReLU -------------------------------

struct Downsampling {
  Map map;                          // of the hidden layer
  Activations hidden, hidden_bias;  // (batch, H, W, dim), without the bias; (dim,)
  const float *weight, *bias;       // of the convolution, (dim, 9), (dim,)

  constexpr Map halved() const { return {map.batch, (map.height + 1) / 2, (map.width + 1) / 2, map.dim}; }
};

// sampled (batch, ceil(H / 2), ceil(W / 2), dim).
void downsample(const Downsampling& layer, Activations sampled, cudaStream_t stream);

// grad_sampled: the gradient of `sampled`. Overwrites the hidden layer with its gradient.
// sums (downsample_partial_sums, 11 dim), to be summed over its first dimension: the gradients of the weight, of the
// bias, and of the hidden layer's bias.
int downsample_partial_sums(const Downsampling& layer);
void downsample_gradients(const Downsampling& layer, Activations sampled, Activations grad_sampled, float* sums,
                          cudaStream_t stream);

constexpr int kVectorChannels = 8;  // that threads of the following kernels read and write at once

// --- GELU of the hidden layer of an MLP ------------------------------------------------------------------------------

struct HiddenLayer {
  int64_t tokens;
  int dim;
  Activations values, bias;  // (tokens, dim), without the bias; (dim,)
};

// activated (tokens, dim) may be where the values are.
void bias_gelu(const HiddenLayer& hidden, Activations activated, cudaStream_t stream);

// grad (tokens, dim): on entry the gradient of `activated`, on return that of the hidden layer. Recomputes `activated`.
// sums (bias_gelu_partial_sums, dim): of the gradient of the bias, to be summed over the first dimension.
int bias_gelu_partial_sums(const HiddenLayer& hidden);
void bias_gelu_backward(const HiddenLayer& hidden, Activations grad, Activations activated, float* sums,
                        cudaStream_t stream);

// --- LayerNorm over channels, with or without a gate -----------------------------------------------------------------

constexpr int kMostNormChannels = 4096;

struct Norm {
  int64_t tokens;
  int dim;
  Activations y;             // (tokens, dim)
  int64_t gate_stride;       // elements between the tokens of the gate
  Activations weight, bias;  // (dim,)
  float eps;
};

struct NormGradients {
  Activations out, y, gate;  // the first is given
  int64_t gate_stride;
  float* sums;  // (2, norm_partial_sums, dim), of the weight and of the bias, to be summed over the second dimension
};

int norm_partial_sums(const Norm& norm);
void gated_norm(const Norm& norm, Activations gate, Activations out, cudaStream_t stream);
void gated_norm_backward(const Norm& norm, Activations gate, const NormGradients& gradients, cudaStream_t stream);
void layer_norm(const Norm& norm, Activations out, cudaStream_t stream);
void layer_norm_backward(const Norm& norm, const NormGradients& gradients, cudaStream_t stream);

// --- Selective scan: u, delta, z (batch, dim, L), B, C (batch, groups, N, L), A (dim, N) -----------------------------

constexpr int kScanThreads = 128, kScanItems = 4, kScanChunk = kScanThreads * kScanItems;

struct SelectiveScan {
  int64_t batch, length;
  int dim, groups, states;
  Scalar type;                        // of u, delta, B, C, z
  const void *u, *delta, *B, *C, *z;  // C and z may be null
  const float *A, *D, *delta_bias;    // D and delta_bias too
  bool delta_softplus;
};

// out: outputs, or float32 states (batch, dim, N, L) if C is null. last_state (batch, dim, N).
void selective_scan(const SelectiveScan& scan, void* out, float* last_state, cudaStream_t stream);

// chunk_states (batch, dim, chunks, N): the states before each chunk of kScanChunk tokens.
void selective_scan_chunk_states(const SelectiveScan& scan, float* chunk_states, cudaStream_t stream);

// Number of neighbouring channels summed by one block of the backward pass; divides dim / groups.
int selective_scan_channels_per_block(const SelectiveScan& scan);

struct SelectiveScanGradients {
  void *u, *delta, *z;
  float *B, *C;               // (batch, dim / channels per block, N, L), to be summed over the channels of a group
  float *A, *D, *delta_bias;  // (batch, dim, N), (batch, dim), (batch, dim), to be summed over the batch
};

void selective_scan_backward(const SelectiveScan& scan, const void* grad_out, const float* grad_last,
                             const float* chunk_states, const SelectiveScanGradients& gradients, cudaStream_t stream);

}  // namespace spatial_mamba
