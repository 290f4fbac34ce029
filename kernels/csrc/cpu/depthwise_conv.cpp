// Depthwise 3x3 convolution of tokens, with bias and an optional SiLU or residual sum; and its gradients.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "convolution.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

// The gradients of the taps, row by row: sums[3 row + k] += grad[j] * x(row, j + k).
template <typename T, int n, typename Load>
inline __attribute__((always_inline)) void correlate(Load&& x, const Vec<T> (&grad)[n], Vec<T>* sums) {
#pragma GCC unroll 3
  for (int row = 0; row < 3; ++row) {
    Vec<T> found[3] = {sums[3 * row], sums[3 * row + 1], sums[3 * row + 2]};
#pragma GCC unroll 8
    for (int column = 0; column < n + 2; ++column) {
      const Vec<T> value = x(row, column);
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        if (column >= k && column - k < n) found[k] += grad[column - k] * value;
      }
    }
    each<3>([&](int k) { sums[3 * row + k] = found[k]; });
  }
}

// --- forward ----------------------------------------------------------------------------------------------------------

template <Epilogue epilogue, typename io>
void forward(const Shape& shape, const Tokens<const io>& x, const Weights<Compute<io>>& weights, io* out) {
  const std::vector<io> zeros(shape.dim, io(0));
  for_items(shape.batch * shape.height, 4, [&](int64_t line) {
    const int64_t b = line / shape.height, i = line % shape.height;
    convolve_row<epilogue>(shape, b, i, x, weights, zeros.data(), out + line * shape.width * shape.dim);
  });
}

// --- backward ---------------------------------------------------------------------------------------------------------

// Gradients of one image, for a few neighbouring vectors of channels. Row by row, the gradient before the epilogue is
// written to a ring of three rows; then the gradient of the row above the newest can be computed.
template <typename io, Epilogue epilogue>
class BackwardTile {
 public:
  using T = Compute<io>;

  BackwardTile(const Shape& shape, int64_t b, int64_t first, int64_t last, const io* grad_out,
               const Tokens<const io>& x, const Weights<T>& weights, const std::vector<io>& zeros)
      : shape_(shape),
        b_(b),
        first_(first),
        count_(last - first),
        grad_out_(grad_out),
        x_(x),
        weights_(weights),
        zeros_(zeros),
        none_(std::max<int64_t>(count_, 1)),
        ring_(3 * shape.width * count_),
        sums_(count_ * (kTaps + 1)) {
    std::fill_n(none_.data(), count_, Vec<T>{});
    std::fill_n(sums_.data(), count_ * (kTaps + 1), Vec<T>{});
  }

  void run(const Tokens<io>& grad_x) {
    for (int64_t i = 0; i <= shape_.height; ++i) {
      if (i < shape_.height) for_blocks(shape_.width, [&](auto n, int64_t j) { before_epilogue<n>(i, j); });
      if (i > 0) for_blocks(shape_.width, [&](auto n, int64_t j) { inputs<n>(i - 1, j, grad_x); });
    }
  }

  // grad_weight: (dim, 9), grad_bias: (dim,), of this image.
  void write_sums(T* grad_weight, T* grad_bias) const {
    write_weight_gradients<T>(shape_, first_, count_, sums_.data(), grad_weight, grad_bias);
  }

 private:
  Vec<T>* grads(int64_t i, int64_t j) { return ring_.data() + ((i % 3) * shape_.width + j) * count_; }

  template <int n>
  void before_epilogue(int64_t i, int64_t j) {
    const Neighbours<io, n> around(shape_, i, j, zeros_.data(), [&](int64_t row, int64_t column) {
      return x_[shape_.token(b_, row) + column];
    });
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      const int lanes = shape_.lanes<T>((first_ + c) * kLanes<T>);
      const Vec<T>* taps = weights_[first_ + c];
      const auto near = around.at(channel, lanes);
      Vec<T> grad[n];
      const io* out = grad_out_ + (shape_.token(b_, i) + j) * shape_.dim + channel;
      each<n>([&](int k) { grad[k] = load(out + k * shape_.dim, lanes); });
      each<n>([&](int k) { prefetch(out + (shape_.width + k) * shape_.dim); });
      each<n>([&](int k) { prefetch(x_[shape_.token(b_, i + 2) + j + k] + channel); });
      if constexpr (epilogue == Epilogue::kSilu) {
        Vec<T> value[n], gate[n];
        each<n>([&](int k) { value[k] = taps[kTaps]; });
        convolve<T, n>(near, [&](int row, int column) { return taps[3 * row + column]; }, value);
        logistic<T, n>(value, gate);
        each<n>([&](int k) { grad[k] *= gate[k] * (T(1) + value[k] * (T(1) - gate[k])); });
      }
      each<n>([&](int k) { grads(i, j + k)[c] = grad[k]; });
      Vec<T>* sums = sums_.data() + c * (kTaps + 1);
      correlate<T, n>(near, grad, sums);
      each<n>([&](int k) { sums[kTaps] += grad[k]; });
    }
  }

  template <int n>
  void inputs(int64_t i, int64_t j, const Tokens<io>& grad_x) {
    const Neighbours<Vec<T>, n> around(shape_, i, j, none_.data(),
                                       [&](int64_t row, int64_t column) { return grads(row, column); });
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      const int lanes = shape_.lanes<T>((first_ + c) * kLanes<T>);
      const Vec<T>* taps = weights_[first_ + c];
      const auto near = [&](int row, int column) { return around.tokens[row][column][c]; };
      Vec<T> sums[n];
      each<n>([&](int k) { sums[k] = epilogue == Epilogue::kResidual ? near(1, k + 1) : Vec<T>{}; });
      convolve<T, n>(near, [&](int row, int column) { return taps[kTaps - 1 - 3 * row - column]; }, sums);
      each<n>([&](int k) { store(grad_x[shape_.token(b_, i) + j + k] + channel, sums[k], lanes); });
      each<n>([&](int k) { prefetch_to_write(grad_x[shape_.token(b_, i + 1) + j + k] + channel); });
    }
  }

  const Shape& shape_;
  int64_t b_, first_, count_;
  const io* grad_out_;
  const Tokens<const io>& x_;
  const Weights<T>& weights_;
  const std::vector<io>& zeros_;
  Vectors<T> none_, ring_, sums_;
};

template <typename io, Epilogue epilogue>
void backward(const Shape& shape, const io* grad_out, const Tokens<const io>& x, const Weights<Compute<io>>& weights,
              const Tokens<io>& grad_x, Compute<io>* grad_weight, Compute<io>* grad_bias) {
  const std::vector<io> zeros(shape.dim, io(0));
  for_channel_tiles<Compute<io>>(shape, [&](int64_t b, int64_t first, int64_t last) {
    BackwardTile<io, epilogue> tile(shape, b, first, last, grad_out, x, weights, zeros);
    tile.run(grad_x);
    tile.write_sums(grad_weight + b * shape.dim * kTaps, grad_bias + b * shape.dim);
  });
}

// --- tensors ----------------------------------------------------------------------------------------------------------

// Calls `run` with the epilogue as a type.
template <typename Run>
void with_epilogue(c10::string_view name, Run&& run) {
  if (name == "none") return run(std::integral_constant<Epilogue, Epilogue::kNone>{});
  if (name == "silu") return run(std::integral_constant<Epilogue, Epilogue::kSilu>{});
  TORCH_CHECK_VALUE(name == "residual", "epilogue must be none, silu or residual, got ", name);
  run(std::integral_constant<Epilogue, Epilogue::kResidual>{});
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& bias, c10::string_view epilogue) {
  const Shape shape = shape_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv", [&] {
    using T = Compute<scalar_t>;
    const Weights<T> weights(shape, weight.const_data_ptr<T>(), bias.const_data_ptr<T>());
    with_epilogue(epilogue, [&](auto kind) {
      forward<kind, scalar_t>(shape, read_tokens<scalar_t>(x, "x"), weights, out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                   const Tensor& bias, c10::string_view epilogue,
                                                   const Tensor& grad_x) {
  const Shape shape = shape_of(x);
  Tensor grad_weight = at::empty({shape.batch, shape.dim, kTaps}, weight.options());
  Tensor grad_bias = at::empty({shape.batch, shape.dim}, bias.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv_backward", [&] {
    using T = Compute<scalar_t>;
    const Weights<T> weights(shape, weight.const_data_ptr<T>(), bias.const_data_ptr<T>());
    with_epilogue(epilogue, [&](auto kind) {
      backward<scalar_t, kind>(shape, grad_out.const_data_ptr<scalar_t>(), read_tokens<scalar_t>(x, "x"), weights,
                               write_tokens<scalar_t>(grad_x, "grad_x"), grad_weight.mutable_data_ptr<T>(),
                               grad_bias.mutable_data_ptr<T>());
    });
  });
  return {grad_weight.sum(0), grad_bias.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("depthwise_conv", torch::dispatch(at::kCPU, &depthwise_conv));
  m.def(
      "depthwise_conv_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, str epilogue, "
      "Tensor(a!) grad_x) -> (Tensor, Tensor)",
      torch::dispatch(at::kCPU, &depthwise_conv_backward));
}

}  // namespace spatial_mamba
