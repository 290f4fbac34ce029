// Two linear layers with the exact GELU between them, and their gradients. Tokens are processed in tiles, so that
// activations stay in the cache; only the hidden layer before the GELU is kept for the gradients.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "gelu.h"
#include "moments.h"
#include "product.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kPartTokens = 64;  // have a sum of their own for the gradient of the bias, for any number of threads

// activated = gelu(hidden + bias); hidden: (tokens, dim).
template <typename io>
void activate(const Tensor& hidden, const Tensor& bias, const Tensor& activated) {
  using T = Compute<io>;
  const int64_t dim = hidden.size(1);
  const io *from = hidden.const_data_ptr<io>(), *offsets = bias.const_data_ptr<io>();
  io* to = activated.mutable_data_ptr<io>();
  at::parallel_for(0, hidden.size(0), 8, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
        Vec<T> x[n];
        each<n>([&](int k) {
          const int64_t at = channel + k * kLanes<T>;
          x[k] = load(from + token * dim + at, lanes) + load(offsets + at, lanes);
        });
        gelu<T, n>(x);
        each<n>([&](int k) { store(to + token * dim + channel + k * kLanes<T>, x[k], lanes); });
      });
    }
  });
}

// Like activate, and turns grad, the gradient of the activations, into that of the hidden layer. grad_bias receives its
// sums: (ceil(tokens / kPartTokens), dim).
template <typename io>
void activate_backward(const Tensor& hidden, const Tensor& bias, const Tensor& activated, const Tensor& grad,
                       Compute<io>* grad_bias) {
  using T = Compute<io>;
  const int64_t tokens = hidden.size(0), dim = hidden.size(1), parts = at::divup(tokens, kPartTokens);
  const io *from = hidden.const_data_ptr<io>(), *offsets = bias.const_data_ptr<io>();
  io *to = activated.mutable_data_ptr<io>(), *grads = grad.mutable_data_ptr<io>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      T* sums = grad_bias + part * dim;
      std::fill_n(sums, dim, T(0));
      for (int64_t token = part * kPartTokens; token < std::min((part + 1) * kPartTokens, tokens); ++token) {
        for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
          Vec<T> x[n], slope[n];
          each<n>([&](int k) {
            const int64_t at = channel + k * kLanes<T>;
            x[k] = load(from + token * dim + at, lanes) + load(offsets + at, lanes);
          });
          gelu<T, n>(x, slope);
          each<n>([&](int k) {
            const int64_t at = channel + k * kLanes<T>;
            store(to + token * dim + at, x[k], lanes);
            slope[k] *= load(grads + token * dim + at, lanes);
            store(grads + token * dim + at, slope[k], lanes);
            store(sums + at, load(sums + at, lanes) + slope[k], lanes);
          });
        });
      }
    }
  });
}

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& project,
                               const Tensor& project_bias, bool keep_hidden) {
  const int64_t tokens = x.size(0), size = tile_size(tokens);
  Tensor out = at::empty({tokens, project.size(0)}, x.options());
  Tensor hidden = at::empty({keep_hidden ? tokens : size, expand.size(0)}, x.options());
  Tensor scratch = at::empty({size, expand.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mlp", [&] {
    for_tiles(tokens, size, [&](int64_t first, int64_t count) {
      Tensor before = hidden.narrow(0, keep_hidden ? first : 0, count), activated = scratch.narrow(0, 0, count);
      product(x.narrow(0, first, count), expand.t(), before);
      activate<scalar_t>(before, expand_bias, activated);
      product(activated, project.t(), out.narrow(0, first, count), project_bias);
    });
  });
  return {out, keep_hidden ? hidden : at::empty({0, expand.size(0)}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& grad_out, const Tensor& x,
                                                                const Tensor& expand, const Tensor& expand_bias,
                                                                const Tensor& project, const Tensor& hidden) {
  const int64_t tokens = x.size(0), dim = expand.size(0), parts = at::divup(tokens, kPartTokens);
  // In half precision there is one tile, because sums over tiles would be rounded after each.
  const int64_t size = x.element_size() == 2 ? tokens : tile_size(tokens);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_expand = at::empty(expand.sizes(), x.options()), grad_project = at::empty(project.sizes(), x.options());
  if (tokens == 0) {
    grad_expand.zero_();
    grad_project.zero_();
  }
  Tensor activations = at::empty({size, dim}, x.options()), gradients = at::empty_like(activations);
  const auto compute_dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor grad_bias = at::empty({parts, dim}, x.options().dtype(compute_dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mlp_backward", [&] {
    for_tiles(tokens, size, [&](int64_t first, int64_t count) {
      const Tensor inputs = x.narrow(0, first, count), grad = grad_out.narrow(0, first, count);
      Tensor activated = activations.narrow(0, 0, count), grad_hidden = gradients.narrow(0, 0, count);
      product(grad, project, grad_hidden);
      activate_backward<scalar_t>(hidden.narrow(0, first, count), expand_bias, activated, grad_hidden,
                                  grad_bias.mutable_data_ptr<Compute<scalar_t>>() + first / kPartTokens * dim);
      product(grad.t(), activated, grad_project, first > 0 ? grad_project : Tensor());
      product(grad_hidden.t(), inputs, grad_expand, first > 0 ? grad_expand : Tensor());
      product(grad_hidden, expand, grad_x.narrow(0, first, count));
    });
  });
  return {grad_x, grad_expand, grad_bias.sum(0).to(expand_bias.scalar_type()), grad_project, grad_out.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("mlp", torch::dispatch(at::kCPU, &mlp));
  m.def("mlp_backward", torch::dispatch(at::kCPU, &mlp_backward));
}

}  // namespace spatial_mamba
