// LayerNorm of every token times the SiLU of its gate, and the gradients.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "gated_norm.h"
#include "moments.h"
#include "tokens.h"
#include "vec.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

// Parts of the tokens with separate sums for the gradients of the weights, independent of the number of threads.
constexpr int64_t kParts = 64;
constexpr int64_t kGrain = 64;  // tokens that are worth a thread

template <typename io, typename yio>
void forward(int64_t tokens, int64_t dim, const yio* y, const Tokens<const io>& gate, const Compute<io>* weight,
             const Compute<io>* bias, Compute<io> eps, io* out) {
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    normalise_and_gate(begin, end, dim, y, gate, weight, bias, eps, out);
  });
}

// grad_weight, grad_bias: (kParts, dim).
template <typename io, typename yio>
void backward(int64_t tokens, int64_t dim, const io* grad_out, const yio* y, const Tokens<const io>& gate,
              const Compute<io>* weight, const Compute<io>* bias, Compute<io> eps, yio* grad_y,
              const Tokens<io>& grad_gate, Compute<io>* grad_weight, Compute<io>* grad_bias) {
  using T = Compute<io>;
  at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    Vectors<T> scaled(chunks_of<T>(dim)), weight_sums(chunks_of<T>(dim)), bias_sums(chunks_of<T>(dim));
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(weight_sums.data(), chunks_of<T>(dim), Vec<T>{});
      std::fill_n(bias_sums.data(), chunks_of<T>(dim), Vec<T>{});
      for (int64_t token = part * tokens / kParts; token < (part + 1) * tokens / kParts; ++token) {
        const yio* values = y + token * dim;
        const io *gates = gate[token], *grads = grad_out + token * dim;
        io* to_gate = grad_gate[token];
        const auto found = moments<T>(values, dim, eps);
        const T mean = found.mean, rstd = found.rstd;
        Vec<T> total[kLockstep] = {}, along[kLockstep] = {};
        for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
          Vec<T> g[n], open[n];
          each<n>([&](int k) { g[k] = load(gates + channel + k * kLanes<T>, lanes); });
          logistic<T, n>(g, open);
          each<n>([&](int k) {
            const int64_t at = channel + k * kLanes<T>, chunk = at / kLanes<T>;
            const Vec<T> normal = (load(values + at, lanes) - mean) * rstd, w = load(weight + at, lanes);
            const Vec<T> grad = load(grads + at, lanes), slope = open[k] * (T(1) + g[k] * (T(1) - open[k]));
            store(to_gate + at, grad * (normal * w + load(bias + at, lanes)) * slope, lanes);
            const Vec<T> to_norm = grad * (g[k] * open[k]);
            weight_sums[chunk] += to_norm * normal;
            bias_sums[chunk] += to_norm;
            scaled[chunk] = to_norm * w;  // zero beyond the last channel, as w is
            total[k] += scaled[chunk];
            along[k] += scaled[chunk] * normal;
          });
        });
        const T mean_grad = sum<T>((total[0] + total[1]) + (total[2] + total[3])) / dim;
        const T mean_along = sum<T>((along[0] + along[1]) + (along[2] + along[3])) / dim;
        for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
          each<n>([&](int k) {
            const int64_t at = channel + k * kLanes<T>;
            const Vec<T> normal = (load(values + at, lanes) - mean) * rstd;
            store(grad_y + token * dim + at, (scaled[at / kLanes<T>] - mean_grad - normal * mean_along) * rstd, lanes);
          });
        });
      }
      for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
        each<n>([&](int k) {
          const int64_t at = channel + k * kLanes<T>;
          store(grad_weight + part * dim + at, weight_sums[at / kLanes<T>], lanes);
          store(grad_bias + part * dim + at, bias_sums[at / kLanes<T>], lanes);
        });
      });
    }
  });
}

// --- tensors ----------------------------------------------------------------------------------------------------------

// Calls `run` with a null pointer of y's type: that of the gate, or the compute type.
template <typename io, typename Run>
void with_dtype_of(const Tensor& y, const Tensor& gate, Run&& run) {
  if (y.scalar_type() == gate.scalar_type()) return run(static_cast<io*>(nullptr));
  constexpr at::ScalarType compute_type = c10::CppTypeToScalarType<Compute<io>>::value;
  TORCH_CHECK_TYPE(y.scalar_type() == compute_type, "y must have the dtype of the gate or ", compute_type, ", got ",
                   y.scalar_type());
  run(static_cast<Compute<io>*>(nullptr));
}

Tensor gated_norm(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, double eps) {
  const int64_t dim = y.size(3), tokens = y.numel() / dim;
  Tensor out = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "gated_norm", [&] {
    using T = Compute<scalar_t>;
    with_dtype_of<scalar_t>(y, gate, [&](auto* kind) {
      using yio = std::remove_pointer_t<decltype(kind)>;
      forward<scalar_t, yio>(tokens, dim, y.const_data_ptr<yio>(), read_tokens<scalar_t>(gate, "gate"),
                             weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), static_cast<T>(eps),
                             out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& grad_out, const Tensor& y, const Tensor& gate,
                                                       const Tensor& weight, const Tensor& bias, double eps,
                                                       const Tensor& grad_gate) {
  const int64_t dim = y.size(3), tokens = y.numel() / dim;
  Tensor grad_y = at::empty_like(y);
  Tensor grad_weight = at::empty({kParts, dim}, weight.options()), grad_bias = at::empty({kParts, dim}, bias.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "gated_norm_backward", [&] {
    using T = Compute<scalar_t>;
    with_dtype_of<scalar_t>(y, gate, [&](auto* kind) {
      using yio = std::remove_pointer_t<decltype(kind)>;
      backward<scalar_t, yio>(tokens, dim, grad_out.const_data_ptr<scalar_t>(), y.const_data_ptr<yio>(),
                              read_tokens<scalar_t>(gate, "gate"), weight.const_data_ptr<T>(),
                              bias.const_data_ptr<T>(), static_cast<T>(eps), grad_y.mutable_data_ptr<yio>(),
                              write_tokens<scalar_t>(grad_gate, "grad_gate"), grad_weight.mutable_data_ptr<T>(),
                              grad_bias.mutable_data_ptr<T>());
    });
  });
  return {grad_y, grad_weight.sum(0), grad_bias.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("gated_norm", torch::dispatch(at::kCPU, &gated_norm));
  m.def(
      "gated_norm_backward(Tensor grad_out, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps, "
      "Tensor(a!) grad_gate) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(at::kCPU, &gated_norm_backward));
}

}  // namespace spatial_mamba
