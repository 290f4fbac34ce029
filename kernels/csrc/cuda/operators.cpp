// The operators of torch.ops.spatial_mamba_cuda: they allocate, call the kernels and add up partial sums.
// Arguments are checked, and contiguous unless they may be channels of a wider map; shapes are those of the modules in
// kernels/.
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "launchers.h"

// The tests also compile this file for the CPU, under another name.
#ifndef SPATIAL_MAMBA_NAMESPACE
#define SPATIAL_MAMBA_NAMESPACE spatial_mamba_cuda
#define SPATIAL_MAMBA_DEVICE CUDA
#endif

namespace {

using at::IntArrayRef;
using at::Tensor;
using spatial_mamba::Activations;
using spatial_mamba::Cut;
using spatial_mamba::DepthwiseConv;
using spatial_mamba::Downsampling;
using spatial_mamba::HiddenLayer;
using spatial_mamba::Map;
using spatial_mamba::Norm;
using spatial_mamba::Offsets;
using spatial_mamba::Recurrence;
using spatial_mamba::Scalar;
using spatial_mamba::SelectiveScan;
using spatial_mamba::Strips;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLanes = 32, kHalfWarp = 16;  // channels per partial sum over channels

int64_t blocks_of(int64_t dim, int64_t channels) { return (dim + channels - 1) / channels; }

// Operators compute in the precision of their arguments, on the device of the first one.
struct Guard {
  explicit Guard(const Tensor& first) : device(first.device()) {}

  const c10::cuda::CUDAGuard device;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream(); }

Scalar scalar_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Scalar::float32;
    case at::kBFloat16:
      return Scalar::bfloat16;
    case at::kHalf:
      return Scalar::float16;
    default:
      TORCH_CHECK_TYPE(false, "CUDA kernels support float32, bfloat16 and float16, got ", x.scalar_type());
  }
}

Activations activations(const Tensor& x) { return {x.data_ptr(), scalar_of(x)}; }

const float* floats(const Tensor& x) { return x.const_data_ptr<float>(); }
float* floats(Tensor& x) { return x.data_ptr<float>(); }
const float* floats(const OptionalTensor& x) { return x ? floats(*x) : nullptr; }

const void* data(const Tensor& x) { return x.const_data_ptr(); }
const void* data(const OptionalTensor& x) { return x ? data(*x) : nullptr; }

Tensor empty_floats(const Tensor& like, IntArrayRef shape) {
  return at::empty(shape, like.options().dtype(at::kFloat));
}

// Sums over the first dimension of float32 tensors, added by a single kernel at the end.
class Sums {
 public:
  // Returns the sum of `parts`, each of which may be a part of a wider row. It is valid after run().
  Tensor of(const Tensor& parts) {
    Tensor sum = at::empty(parts.sizes().slice(1), parts.options());
    return add(parts, sum, 1), sum;
  }

  // Writes the sum to a vector, which need not be contiguous.
  void into(Tensor& sum, const Tensor& parts) { add(parts, sum, sum.stride(0)); }

  void run() const {
    spatial_mamba::add_partial_sums(pending_.data(), static_cast<int>(pending_.size()), current_stream());
  }

 private:
  void add(const Tensor& parts, Tensor& sum, int64_t stride) {
    TORCH_INTERNAL_ASSERT(pending_.size() < spatial_mamba::kMostPartialSums);
    const auto count = static_cast<int>(parts.size(0));
    pending_.push_back({floats(parts), count, sum.numel(), parts.stride(0), floats(sum), stride});
    kept_.push_back(parts);
  }

  std::vector<spatial_mamba::PartialSums> pending_;
  std::vector<Tensor> kept_;
};

// The gradients of a weight and a bias from their partial sums.
std::tuple<Tensor, Tensor> sums_of_both(const Tensor& weight_parts, const Tensor& bias_parts) {
  Sums sums;
  const Tensor weight = sums.of(weight_parts), bias = sums.of(bias_parts);
  sums.run();
  return {weight, bias};
}

Map map_of(const Tensor& x) {
  return {x.size(0), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
}

Offsets offsets_of(IntArrayRef pairs) {
  const auto count = static_cast<int>(pairs.size() / 2);
  TORCH_CHECK_VALUE(count <= spatial_mamba::kMaxTaps, "offsets: CUDA kernels support at most ", spatial_mamba::kMaxTaps,
                    " distinct taps, got ", count);
  Offsets offsets;
  offsets.count = count;
  for (int t = 0; t < count; ++t) {
    offsets.row[t] = static_cast<int>(pairs[2 * t]);
    offsets.column[t] = static_cast<int>(pairs[2 * t + 1]);
  }
  return offsets;
}

// The types that kernels combine with the type of u: the same and float32.
bool pairs_with(at::ScalarType type, const Tensor& u) { return type == u.scalar_type() || type == at::kFloat; }

// --- State fusion ----------------------------------------------------------------------------------------------------

Tensor state_fusion(const Tensor& h, const Tensor& taps, IntArrayRef offsets) {
  const Guard guard(h);
  Tensor fused = at::empty_like(h);
  spatial_mamba::fuse(map_of(h), activations(h), floats(taps), offsets_of(offsets), activations(fused),
                      current_stream());
  return fused;
}

Tensor gradient_of_taps(const Tensor& grad, const float* C, const Tensor& h, const Offsets& offsets) {
  const Map map = map_of(h);
  Tensor partial = empty_floats(h, {spatial_mamba::tap_partial_sums(map, offsets), offsets.count, map.dim});
  spatial_mamba::tap_gradients(map, activations(grad), C, activations(h), offsets, floats(partial), current_stream());
  return partial.sum(0);
}

std::tuple<Tensor, Tensor> state_fusion_backward(const Tensor& grad_out, const Tensor& h, const Tensor& taps,
                                                 IntArrayRef pairs) {
  const Guard guard(h);
  const Offsets offsets = offsets_of(pairs);
  Tensor grad_h = at::empty_like(h);
  spatial_mamba::fuse_adjoint(map_of(h), activations(grad_out), nullptr, floats(taps), offsets, activations(grad_h),
                              current_stream());
  return {grad_h, gradient_of_taps(grad_out, nullptr, h, offsets)};
}

// --- Structure-aware scan --------------------------------------------------------------------------------------------

Recurrence recurrence_of(const Tensor& u, const Tensor& projection, const Tensor& step_weight, const Tensor& step_bias,
                         const Tensor& A_log, const Tensor& D) {
  return {map_of(u),
          activations(u),
          activations(projection),
          floats(step_weight),
          floats(step_bias),
          floats(A_log),
          floats(D),
          static_cast<int>(step_weight.size(1))};
}

Tensor read_out_weights(const Tensor& projection) {
  return projection.select(-1, projection.size(-1) - 1).to(at::kFloat).contiguous();
}

// (batch, H, strips, dim)
Tensor states_before(const Recurrence& recurrence, const Tensor& u, const Strips& strips) {
  const Map& map = recurrence.map;
  Tensor states = empty_floats(u, {map.batch, map.height, strips.count, map.dim});
  Tensor piece_maps = empty_floats(u, {map.batch, map.height, strips.count, map.dim, 2});
  spatial_mamba::find_states(recurrence, strips, floats(piece_maps), floats(states), current_stream());
  return states;
}

std::tuple<Tensor, Tensor> structure_aware_scan(const Tensor& u, const Tensor& projection, const Tensor& step_weight,
                                                const Tensor& step_bias, const Tensor& A_log, const Tensor& D,
                                                const Tensor& taps, IntArrayRef pairs, at::ScalarType out_dtype) {
  const Guard guard(u);
  const cudaStream_t stream = current_stream();
  const Offsets offsets = offsets_of(pairs);
  const Recurrence recurrence = recurrence_of(u, projection, step_weight, step_bias, A_log, D);
  const Map& map = recurrence.map;
  Tensor y = at::empty_like(u, u.options().dtype(pairs_with(out_dtype, u) ? out_dtype : at::kFloat));
  Tensor row_states;
  if (spatial_mamba::streaming_serves(offsets) && spatial_mamba::chunk_scan_serves(recurrence, activations(y))) {
    const Cut cut = spatial_mamba::chunk_scan_cut(map);
    Tensor states =
        cut.whole() ? empty_floats(u, {map.batch, map.height, 1, map.dim}) : states_before(recurrence, u, cut.strips);
    spatial_mamba::chunk_scan(recurrence, floats(taps), cut.whole() ? nullptr : floats(states),
                              cut.whole() ? floats(states) : nullptr, activations(y), stream);
    row_states = states.select(2, 0).contiguous();
  } else {
    row_states = states_before(recurrence, u, spatial_mamba::kWholeRows).squeeze(2);
    Tensor h = empty_floats(u, u.sizes());
    spatial_mamba::restore_states(recurrence, floats(row_states), floats(h), stream);
    const Tensor C = read_out_weights(projection);
    spatial_mamba::fuse_and_read_out(map, floats(h), floats(taps), offsets, floats(C), activations(u), floats(D),
                                     activations(y), stream);
  }
  return {y.to(out_dtype), row_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> structure_aware_scan_backward(
    const Tensor& grad_out, const Tensor& u, const Tensor& projection, const Tensor& step_weight,
    const Tensor& step_bias, const Tensor& A_log, const Tensor& D, const Tensor& taps, const Tensor& row_states,
    IntArrayRef pairs) {
  const Guard guard(u);
  const cudaStream_t stream = current_stream();
  const Offsets offsets = offsets_of(pairs);
  const Recurrence recurrence = recurrence_of(u, projection, step_weight, step_bias, A_log, D);
  const Map& map = recurrence.map;
  const int64_t rank = recurrence.rank, tokens = map.batch * map.height * map.width;
  const Tensor grad_y = pairs_with(grad_out.scalar_type(), u) ? grad_out : grad_out.to(at::kFloat);

  const bool published =
      spatial_mamba::streaming_serves(offsets) && spatial_mamba::chunk_scan_serves(recurrence, activations(grad_y));
  const bool in_one_pass = published && spatial_mamba::chunk_gradients_serve(recurrence, activations(grad_y));
  Tensor h, C;
  if (!in_one_pass) {
    h = empty_floats(u, u.sizes());
    spatial_mamba::restore_states(recurrence, floats(row_states), floats(h), stream);
    C = read_out_weights(projection);
  }

  Sums sums;
  Tensor grad_C, grad_taps;
  if (published) {
    const Cut cut = spatial_mamba::read_out_gradients_cut(map);
    const Tensor states = cut.strips.count == 1 ? row_states : states_before(recurrence, u, cut.strips);
    grad_C = empty_floats(u, {blocks_of(map.dim, kHalfWarp), tokens});
    grad_taps = empty_floats(u, {map.batch * cut.bands * cut.strips.count, offsets.count, map.dim});
    spatial_mamba::read_out_gradients(recurrence, activations(grad_y), floats(taps), floats(states), floats(grad_C),
                                      floats(grad_taps), stream);
    grad_taps = sums.of(grad_taps);
  } else {
    grad_C = empty_floats(u, {spatial_mamba::read_out_partial_sums(map), tokens});
    spatial_mamba::read_out_gradient(map, activations(grad_y), floats(h), floats(taps), offsets, floats(grad_C),
                                     stream);
    grad_taps = gradient_of_taps(grad_y, floats(C), h, offsets);
  }

  Tensor grad_u = at::empty_like(u), grad_step = empty_floats(u, u.sizes());
  Tensor grad_B = empty_floats(u, {blocks_of(map.dim, in_one_pass ? kHalfWarp : kLanes), tokens});
  Tensor grad_A_log = empty_floats(u, {in_one_pass ? map.batch : spatial_mamba::partial_sums(map), map.dim});
  Tensor grad_D = at::empty_like(grad_A_log);
  const spatial_mamba::RecurrenceGradients gradients = {activations(grad_u), floats(grad_step), floats(grad_B),
                                                        floats(grad_A_log), floats(grad_D)};
  if (in_one_pass) {
    spatial_mamba::chunk_gradients(recurrence, activations(grad_y), floats(taps), floats(row_states), gradients,
                                   stream);
  } else {
    spatial_mamba::fuse_adjoint(map, activations(grad_y), floats(C), floats(taps), offsets, activations(grad_step),
                                stream);
    Tensor row_maps = empty_floats(u, {map.batch, map.height, map.dim, 2});
    Tensor row_carries = at::empty_like(row_states);
    spatial_mamba::recurrence_gradients(recurrence, activations(grad_y), floats(h), floats(row_states),
                                        floats(row_maps), floats(row_carries), gradients, stream);
  }

  const at::NoTF32Guard matrix_products_in_full_precision;
  grad_step = grad_step.view({tokens, map.dim});
  // r and columns of ones, whose product with grad_step is the gradient of the bias. Rows are padded to 16 bytes, for
  // which cuBLAS has faster kernels.
  Tensor factors = at::ones({tokens, (rank + 1 + 3) / 4 * 4}, u.options().dtype(at::kFloat));
  factors.narrow(1, 0, rank).copy_(projection.view({tokens, rank + 2}).narrow(1, 0, rank));
  const Tensor grad_factors = at::mm(grad_step.t(), factors);
  Tensor grad_projection = empty_floats(u, {tokens, rank + 2});
  Tensor of_r = grad_projection.narrow(1, 0, rank), of_B = grad_projection.select(1, rank);
  Tensor of_C = grad_projection.select(1, rank + 1);
  at::mm_out(of_r, grad_step, step_weight);
  sums.into(of_B, grad_B);
  sums.into(of_C, grad_C);
  grad_A_log = sums.of(grad_A_log);
  grad_D = sums.of(grad_D);
  sums.run();
  return {grad_u,
          grad_projection.to(projection.scalar_type()).view(projection.sizes()),
          grad_factors.narrow(1, 0, rank).clone(at::MemoryFormat::Contiguous),
          grad_factors.select(1, rank).clone(),
          grad_A_log,
          grad_D,
          grad_taps};
}

// --- Depthwise convolution -------------------------------------------------------------------------------------------

// The tokens of x may be channels of a wider map; stride(2) is the distance between them.
DepthwiseConv conv_of(const Tensor& x, const Tensor& weight, const Tensor& bias, c10::string_view epilogue) {
  const bool silu = epilogue == "silu", residual = epilogue == "residual";
  return {map_of(x), activations(x), x.stride(2), floats(weight), floats(bias), silu, residual, /*mirrored=*/false};
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& bias, c10::string_view epilogue) {
  const Guard guard(x);
  Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  spatial_mamba::depthwise_conv(conv_of(x, weight, bias, epilogue), activations(out), out.size(3), current_stream());
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                   const Tensor& bias, c10::string_view epilogue, Tensor& grad_x) {
  const Guard guard(x);
  const cudaStream_t stream = current_stream();
  DepthwiseConv conv = conv_of(x, weight, bias, epilogue);
  const int64_t dim = x.size(3);
  Tensor grad_convolved = conv.silu ? at::empty_like(grad_out) : grad_out;
  Tensor parts = empty_floats(x, {spatial_mamba::depthwise_conv_partial_sums(conv.map), 10 * dim});
  spatial_mamba::depthwise_conv_gradients(conv, activations(grad_out), activations(grad_convolved), floats(parts),
                                          stream);
  conv = {conv.map, activations(grad_convolved), dim, conv.weight, nullptr, false, conv.residual, /*mirrored=*/true};
  spatial_mamba::depthwise_conv(conv, activations(grad_x), grad_x.stride(2), stream);
  const auto [grad_weight, grad_bias] = sums_of_both(parts.narrow(1, 0, 9 * dim), parts.narrow(1, 9 * dim, dim));
  return {grad_weight.view_as(weight), grad_bias};
}

// --- Downsampling ----------------------------------------------------------------------------------------------------

Downsampling downsampling_of(const Tensor& hidden, const Tensor& hidden_bias, const Tensor& weight,
                             const Tensor& bias) {
  return {map_of(hidden), activations(hidden), activations(hidden_bias), floats(weight), floats(bias)};
}

Tensor downsample(const Downsampling& layer, const Tensor& hidden) {
  const Map halved = layer.halved();
  Tensor sampled = at::empty({halved.batch, halved.height, halved.width, halved.dim}, hidden.options());
  spatial_mamba::downsample(layer, activations(sampled), current_stream());
  return sampled;
}

Tensor downsampling(const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& conv_weight,
                    const Tensor& conv_bias, const Tensor& project, const Tensor& project_bias) {
  const Guard guard(x);
  Tensor hidden = at::linear(x, expand);
  const Tensor sampled = downsample(downsampling_of(hidden, expand_bias, conv_weight, conv_bias), hidden);
  hidden.reset();
  return at::linear(sampled, project, project_bias);
}

// Recomputes the hidden layer, which its gradient then overwrites.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> downsampling_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& expand, const Tensor& expand_bias,
    const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& project) {
  const Guard guard(x);
  const int64_t dim = expand.size(0);
  const Tensor hidden = at::linear(x, expand);
  const Downsampling layer = downsampling_of(hidden, expand_bias, conv_weight, conv_bias);
  const Tensor grad = grad_out.flatten(0, 2);
  Tensor sampled = downsample(layer, hidden), grad_sampled = at::mm(grad, project);
  const Tensor grad_project = at::mm(grad.t(), sampled.flatten(0, 2));
  Tensor parts = empty_floats(x, {spatial_mamba::downsample_partial_sums(layer), 11 * dim});
  spatial_mamba::downsample_gradients(layer, activations(sampled), activations(grad_sampled), floats(parts),
                                      current_stream());
  Sums sums;
  const Tensor grad_weight = sums.of(parts.narrow(1, 0, 9 * dim)), grad_bias = sums.of(parts.narrow(1, 9 * dim, dim));
  const Tensor grad_hidden_bias = sums.of(parts.narrow(1, 10 * dim, dim));
  sums.run();
  sampled.reset();
  grad_sampled.reset();
  const Tensor grad_hidden = hidden.flatten(0, 2);
  return {at::mm(grad_hidden, expand).view_as(x),
          at::mm(grad_hidden.t(), x.flatten(0, 2)),
          grad_hidden_bias.to(expand_bias.scalar_type()),
          grad_weight.view_as(conv_weight),
          grad_bias,
          grad_project};
}

// --- MLP -------------------------------------------------------------------------------------------------------------

HiddenLayer hidden_layer(const Tensor& values, const Tensor& bias) {
  return {values.size(0), static_cast<int>(values.size(1)), activations(values), activations(bias)};
}

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& project,
                               const Tensor& project_bias, bool keep_hidden) {
  const Guard guard(x);
  const Tensor hidden = at::mm(x, expand.t()), activated = keep_hidden ? at::empty_like(hidden) : hidden;
  spatial_mamba::bias_gelu(hidden_layer(hidden, expand_bias), activations(activated), current_stream());
  return {at::addmm(project_bias, activated, project.t()),
          keep_hidden ? hidden : at::empty({0, hidden.size(1)}, hidden.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& grad_out, const Tensor& x,
                                                                const Tensor& expand, const Tensor& expand_bias,
                                                                const Tensor& project, const Tensor& hidden) {
  const Guard guard(x);
  const Tensor grad_hidden = at::mm(grad_out, project);
  Tensor activated = at::empty_like(hidden);
  const HiddenLayer layer = hidden_layer(hidden, expand_bias);
  Tensor parts = empty_floats(x, {spatial_mamba::bias_gelu_partial_sums(layer), layer.dim});
  spatial_mamba::bias_gelu_backward(layer, activations(grad_hidden), activations(activated), floats(parts),
                                    current_stream());
  Sums sums;
  const Tensor grad_bias = sums.of(parts);
  sums.run();
  const Tensor grad_project = at::mm(grad_out.t(), activated);
  activated.reset();
  return {at::mm(grad_hidden, expand), at::mm(grad_hidden.t(), x), grad_bias.to(expand_bias.scalar_type()),
          grad_project, grad_out.sum(0)};
}

// --- Norms -----------------------------------------------------------------------------------------------------------

// The tokens of a gate may be channels of a wider map.
Norm norm_of(const Tensor& y, int64_t gate_stride, const Tensor& weight, const Tensor& bias, double eps) {
  const int64_t dim = weight.numel();
  TORCH_CHECK_VALUE(dim <= spatial_mamba::kMostNormChannels, "weight: CUDA norms support at most ",
                    spatial_mamba::kMostNormChannels,
                    " channels, got ", dim, "; SPATIAL_MAMBA_BACKEND=triton or torch selects another backend");
  return {dim == 0 ? 0 : y.numel() / dim, static_cast<int>(dim),  activations(y), gate_stride,
          activations(weight),            activations(bias), static_cast<float>(eps)};
}

Tensor gated_norm(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, double eps) {
  const Guard guard(y);
  Tensor out = at::empty_like(gate, at::MemoryFormat::Contiguous);
  const Norm norm = norm_of(y, gate.stride(2), weight, bias, eps);
  spatial_mamba::gated_norm(norm, activations(gate), activations(out), current_stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& grad_out, const Tensor& y, const Tensor& gate,
                                                       const Tensor& weight, const Tensor& bias, double eps,
                                                       Tensor& grad_gate) {
  const Guard guard(y);
  Tensor grad_y = at::empty_like(y);
  const Norm norm = norm_of(y, gate.stride(2), weight, bias, eps);
  Tensor parts = empty_floats(y, {2, spatial_mamba::norm_partial_sums(norm), norm.dim});
  spatial_mamba::gated_norm_backward(
      norm, activations(gate),
      {activations(grad_out), activations(grad_y), activations(grad_gate), grad_gate.stride(2), floats(parts)},
      current_stream());
  return std::tuple_cat(std::tuple(grad_y), sums_of_both(parts[0], parts[1]));
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Guard guard(x);
  Tensor out = at::empty_like(x);
  spatial_mamba::layer_norm(norm_of(x, weight.numel(), weight, bias, eps), activations(out), current_stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, double eps) {
  const Guard guard(x);
  Tensor grad_x = at::empty_like(x);
  const Norm norm = norm_of(x, weight.numel(), weight, bias, eps);
  Tensor parts = empty_floats(x, {2, spatial_mamba::norm_partial_sums(norm), norm.dim});
  spatial_mamba::layer_norm_backward(
      norm, {activations(grad_out), activations(grad_x), activations(x), norm.dim, floats(parts)}, current_stream());
  return std::tuple_cat(std::tuple(grad_x), sums_of_both(parts[0], parts[1]));
}

// --- Everything between the projections of a block -------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> spatial_mixer(const Tensor& x, const Tensor& gate, const Tensor& conv_weight,
                                                 const Tensor& conv_bias, const Tensor& projection_weight,
                                                 const Tensor& step_weight, const Tensor& step_bias,
                                                 const Tensor& A_log, const Tensor& D, const Tensor& taps,
                                                 const Tensor& norm_weight, const Tensor& norm_bias,
                                                 IntArrayRef offsets, double eps, bool keep) {
  const Guard guard(x);
  const Tensor u = depthwise_conv(x, conv_weight, conv_bias, "silu");
  const Tensor projection = at::linear(u, projection_weight);
  const auto [y, row_states] =
      structure_aware_scan(u, projection, step_weight, step_bias, A_log, D, taps, offsets, at::kFloat);
  Tensor out = gated_norm(y, gate, norm_weight, norm_bias, eps);
  if (keep) return {out, y, row_states};
  return {out, at::empty({0}, y.options()), at::empty({0}, y.options())};
}

// The gradients of all weights and, into grad_x and grad_gate, of both halves of the tokens. u and the projection are
// computed again.
std::vector<Tensor> spatial_mixer_backward(const Tensor& grad_out, const Tensor& x, const Tensor& gate,
                                           const Tensor& conv_weight, const Tensor& conv_bias,
                                           const Tensor& projection_weight, const Tensor& step_weight,
                                           const Tensor& step_bias, const Tensor& A_log, const Tensor& D,
                                           const Tensor& taps, const Tensor& norm_weight, const Tensor& norm_bias,
                                           const Tensor& y, const Tensor& row_states, IntArrayRef offsets, double eps,
                                           Tensor& grad_x, Tensor& grad_gate) {
  const Guard guard(x);
  auto [grad_y, grad_norm_weight, grad_norm_bias] =
      gated_norm_backward(grad_out, y, gate, norm_weight, norm_bias, eps, grad_gate);
  const Tensor u = depthwise_conv(x, conv_weight, conv_bias, "silu");
  const Tensor projection = at::linear(u, projection_weight);
  auto [grad_u, grad_projection, grad_step_weight, grad_step_bias, grad_A_log, grad_D, grad_taps] =
      structure_aware_scan_backward(grad_y, u, projection, step_weight, step_bias, A_log, D, taps, row_states, offsets);
  grad_y.reset();
  const Tensor of_tokens = grad_projection.flatten(0, 2);
  grad_u.flatten(0, 2).addmm_(of_tokens, projection_weight);
  const Tensor grad_projection_weight = at::mm(of_tokens.t(), u.flatten(0, 2));
  auto [grad_conv_weight, grad_conv_bias] = depthwise_conv_backward(grad_u, x, conv_weight, conv_bias, "silu", grad_x);
  return {grad_conv_weight, grad_conv_bias, grad_projection_weight, grad_step_weight, grad_step_bias,
          grad_A_log,       grad_D,         grad_taps,              grad_norm_weight, grad_norm_bias};
}

// --- Selective scan --------------------------------------------------------------------------------------------------

SelectiveScan scan_of(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const OptionalTensor& C,
                      const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                      bool delta_softplus) {
  SelectiveScan scan;
  scan.batch = u.size(0);
  scan.length = u.size(2);
  scan.dim = static_cast<int>(u.size(1));
  scan.groups = static_cast<int>(B.size(1));
  scan.states = static_cast<int>(A.size(1));
  scan.type = scalar_of(u);
  scan.u = data(u);
  scan.delta = data(delta);
  scan.B = data(B);
  scan.C = data(C);
  scan.z = data(z);
  scan.A = floats(A);
  scan.D = floats(D);
  scan.delta_bias = floats(delta_bias);
  scan.delta_softplus = delta_softplus;
  return scan;
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                          const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                          const OptionalTensor& delta_bias, bool delta_softplus) {
  const Guard guard(u);
  const SelectiveScan scan = scan_of(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
  Tensor out = C ? at::empty_like(u) : empty_floats(u, {scan.batch, scan.dim, scan.states, scan.length});
  Tensor last_state = empty_floats(u, {scan.batch, scan.dim, scan.states});
  spatial_mamba::selective_scan(scan, out.data_ptr(), floats(last_state), current_stream());
  return {out, last_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_out, const Tensor& grad_last, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus) {
  const Guard guard(u);
  const cudaStream_t stream = current_stream();
  const SelectiveScan scan = scan_of(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
  const int64_t chunks = (scan.length + spatial_mamba::kScanChunk - 1) / spatial_mamba::kScanChunk;
  Tensor chunk_states = empty_floats(u, {scan.batch, scan.dim, chunks, scan.states});
  spatial_mamba::selective_scan_chunk_states(scan, floats(chunk_states), stream);

  // (batch, groups, blocks of channels in a group, N, L): one per block, so the sum over channels needs no atomics.
  const int64_t blocks = scan.dim / scan.groups / spatial_mamba::selective_scan_channels_per_block(scan);
  const std::vector<int64_t> partial_shape = {scan.batch, scan.groups, blocks, scan.states, scan.length};
  const auto absent = [&] { return at::empty({0}, u.options()); };  // a new one per call: outputs must not share memory
  Tensor grad_u = at::empty_like(u), grad_delta = at::empty_like(delta), grad_z = z ? at::empty_like(*z) : absent();
  Tensor grad_B = empty_floats(u, partial_shape), grad_C = C ? empty_floats(u, partial_shape) : absent();
  Tensor grad_A = empty_floats(u, {scan.batch, scan.dim, scan.states});
  Tensor grad_D = empty_floats(u, {scan.batch, scan.dim}), grad_bias = at::empty_like(grad_D);
  spatial_mamba::selective_scan_backward(
      scan, data(grad_out), floats(grad_last), floats(chunk_states),
      {grad_u.data_ptr(), grad_delta.data_ptr(), z ? grad_z.data_ptr() : nullptr, floats(grad_B),
       C ? floats(grad_C) : nullptr, floats(grad_A), floats(grad_D), floats(grad_bias)},
      stream);
  return {grad_u,
          grad_delta,
          grad_A.sum(0),
          grad_B.sum(2).to(B.scalar_type()),
          C ? grad_C.sum(2).to(C->scalar_type()) : grad_C,
          D ? grad_D.sum(0) : absent(),
          grad_z,
          delta_bias ? grad_bias.sum(0) : absent()};
}

// --- Registration ----------------------------------------------------------------------------------------------------

// Expands the name, which TORCH_LIBRARY itself would take literally.
#define WITH_NAMESPACE(macro, ...) macro(__VA_ARGS__)

WITH_NAMESPACE(TORCH_LIBRARY, SPATIAL_MAMBA_NAMESPACE, library) {
  // PyTorch infers a schema from the function, but not which arguments it writes to, and takes dtypes for integers.
  const auto on_device = [](auto function) {
    return torch::dispatch(c10::DispatchKey::SPATIAL_MAMBA_DEVICE, function);
  };
  library.def("selective_scan", on_device(selective_scan));
  library.def("selective_scan_backward", on_device(selective_scan_backward));
  library.def("depthwise_conv", on_device(depthwise_conv));
  library.def(
      "depthwise_conv_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, str epilogue, "
      "Tensor(a!) grad_x) -> (Tensor, Tensor)",
      on_device(depthwise_conv_backward));
  library.def("downsampling", on_device(downsampling));
  library.def("downsampling_backward", on_device(downsampling_backward));
  library.def("gated_norm", on_device(gated_norm));
  library.def(
      "gated_norm_backward(Tensor grad_out, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps, "
      "Tensor(a!) grad_gate) -> (Tensor, Tensor, Tensor)",
      on_device(gated_norm_backward));
  library.def("layer_norm", on_device(layer_norm));
  library.def("layer_norm_backward", on_device(layer_norm_backward));
  library.def("mlp", on_device(mlp));
  library.def("mlp_backward", on_device(mlp_backward));
  library.def("spatial_mixer", on_device(spatial_mixer));
  library.def(
      "spatial_mixer_backward(Tensor grad_out, Tensor x, Tensor gate, Tensor conv_weight, Tensor conv_bias, "
      "Tensor projection_weight, Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, Tensor taps, "
      "Tensor norm_weight, Tensor norm_bias, Tensor y, Tensor row_states, int[] offsets, float eps, Tensor(a!) grad_x, "
      "Tensor(b!) grad_gate) -> Tensor[]",
      on_device(spatial_mixer_backward));
  library.def("state_fusion", on_device(state_fusion));
  library.def("state_fusion_backward", on_device(state_fusion_backward));
  library.def(
      "structure_aware_scan(Tensor u, Tensor projection, Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, "
      "Tensor taps, int[] offsets, ScalarType out_dtype) -> (Tensor, Tensor)",
      on_device(structure_aware_scan));
  library.def("structure_aware_scan_backward", on_device(structure_aware_scan_backward));
}

}  // namespace
