// A linear layer without bias, and its gradients.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "product.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& weight) {
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  product(x, weight.t(), out);
  return out;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight) {
  Tensor grad_x = at::empty(x.sizes(), x.options());
  product(grad_out, weight, grad_x);
  Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  product(grad_out.t(), x, grad_weight);
  return {grad_x, grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_backward(Tensor grad_out, Tensor x, Tensor weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(spatial_mamba_cpu, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace spatial_mamba
