// ReLU, depthwise 3x3 convolution of stride 2 with bias, ReLU; and the gradients. Maps are read and written once.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "downsampling_conv.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

template <typename io>
void forward(const Shape& shape, const io* x, const Weights<Compute<io>>& weights, io* out) {
  const Shape outputs = halved(shape);
  const std::vector<io> zeros(shape.dim, io(0));
  at::parallel_for(0, outputs.batch * outputs.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const io* image = x + shape.token(line / outputs.height, 0) * shape.dim;
      const auto row = [&](int64_t i) { return image + i * shape.width * shape.dim; };
      downsample_row(shape, row, line % outputs.height, weights, zeros.data(), out + line * outputs.width * shape.dim);
    }
  });
}

// Gradients of one image, for a few neighbouring vectors of channels. The gradients of the sums are kept in a ring of
// two rows of outputs; then those of the two rows of inputs between them can be computed.
template <typename io>
class BackwardTile {
 public:
  using T = Compute<io>;

  BackwardTile(const Shape& shape, int64_t b, int64_t first, int64_t last, const io* grad_out, const io* x,
               const Weights<T>& weights, const std::vector<io>& zeros)
      : shape_(shape),
        outputs_(halved(shape)),
        b_(b),
        first_(first),
        count_(last - first),
        grad_out_(grad_out),
        x_(x),
        weights_(weights),
        zeros_(zeros),
        ring_(2 * (outputs_.width + 1) * count_),
        sums_(count_ * (kTaps + 1)) {
    std::fill_n(ring_.data(), 2 * (outputs_.width + 1) * count_, Vec<T>{});  // a column beyond the last stays 0
    std::fill_n(sums_.data(), count_ * (kTaps + 1), Vec<T>{});
  }

  void run(io* grad_x) {
    for (int64_t i = 0; i <= outputs_.height; ++i) {
      if (i < outputs_.height) {
        for (int64_t j = 0; j < outputs_.width; ++j) before_relu(i, j);
      } else {
        std::fill_n(grads(i, 0), outputs_.width * count_, Vec<T>{});
      }
      if (i == 0) continue;
      for (int64_t j = 0; j < outputs_.width; ++j) inputs(i - 1, j, grad_x);
    }
  }

  // grad_weight: (dim, 9), grad_bias: (dim,), of this image.
  void write_sums(T* grad_weight, T* grad_bias) const {
    write_weight_gradients<T>(shape_, first_, count_, sums_.data(), grad_weight, grad_bias);
  }

 private:
  Vec<T>* grads(int64_t i, int64_t j) { return ring_.data() + (i % 2 * (outputs_.width + 1) + j) * count_; }

  void before_relu(int64_t i, int64_t j) {
    const auto row = [&](int64_t k) { return x_ + shape_.token(b_, k) * shape_.dim; };
    const auto around = inputs_of(shape_, row, i, j, zeros_.data());
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      const int lanes = shape_.lanes<T>(channel);
      const Window<io> window(around, channel, lanes, weights_[first_ + c]);
      const Vec<T> grad_out = load(grad_out_ + (outputs_.token(b_, i) + j) * shape_.dim + channel, lanes);
      const Vec<T> grad = window.sum <= 0 ? Vec<T>{} : grad_out;
      Vec<T>* sums = sums_.data() + c * (kTaps + 1);
      each<kTaps>([&](int k) { sums[k] += grad * window.near[k]; });
      sums[kTaps] += grad;
      grads(i, j)[c] = grad;
    }
  }

  // The 2x2 inputs from (2 i, 2 j) on, which the outputs (i, j) to (i + 1, j + 1) read.
  void inputs(int64_t i, int64_t j, io* grad_x) {
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      const int lanes = shape_.lanes<T>(channel);
      const Vec<T>* taps = weights_[first_ + c];
      const Vec<T> here = grads(i, j)[c], right = grads(i, j + 1)[c], below = grads(i + 1, j)[c];
      const Vec<T> found[2][2] = {
          {taps[4] * here, taps[5] * here + taps[3] * right},
          {taps[7] * here + taps[1] * below,
           taps[8] * here + taps[6] * right + taps[2] * below + taps[0] * grads(i + 1, j + 1)[c]},
      };
      for (int64_t row = 0; row < std::min<int64_t>(2, shape_.height - 2 * i); ++row) {
        for (int64_t column = 0; column < std::min<int64_t>(2, shape_.width - 2 * j); ++column) {
          const int64_t at = (shape_.token(b_, 2 * i + row) + 2 * j + column) * shape_.dim + channel;
          store(grad_x + at, load(x_ + at, lanes) <= 0 ? Vec<T>{} : found[row][column], lanes);
        }
      }
    }
  }

  const Shape& shape_;
  Shape outputs_;
  int64_t b_, first_, count_;
  const io *grad_out_, *x_;
  const Weights<T>& weights_;
  const std::vector<io>& zeros_;
  Vectors<T> ring_, sums_;
};

template <typename io>
void backward(const Shape& shape, const io* grad_out, const io* x, const Weights<Compute<io>>& weights, io* grad_x,
              Compute<io>* grad_weight, Compute<io>* grad_bias) {
  const std::vector<io> zeros(shape.dim, io(0));
  for_channel_tiles<Compute<io>>(shape, [&](int64_t b, int64_t first, int64_t last) {
    BackwardTile<io> tile(shape, b, first, last, grad_out, x, weights, zeros);
    tile.run(grad_x);
    tile.write_sums(grad_weight + b * shape.dim * kTaps, grad_bias + b * shape.dim);
  });
}

Tensor downsampling_conv(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Shape shape = shape_of(x), outputs = halved(shape);
  Tensor out = at::empty({outputs.batch, outputs.height, outputs.width, outputs.dim}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "downsampling_conv", [&] {
    using T = Compute<scalar_t>;
    const Weights<T> weights(shape, weight.const_data_ptr<T>(), bias.const_data_ptr<T>());
    forward(shape, x.const_data_ptr<scalar_t>(), weights, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> downsampling_conv_backward(const Tensor& grad_out, const Tensor& x,
                                                              const Tensor& weight, const Tensor& bias) {
  const Shape shape = shape_of(x);
  Tensor grad_x = at::empty_like(x);
  Tensor grad_weight = at::empty({shape.batch, shape.dim, kTaps}, weight.options());
  Tensor grad_bias = at::empty({shape.batch, shape.dim}, bias.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "downsampling_conv_backward", [&] {
    using T = Compute<scalar_t>;
    const Weights<T> weights(shape, weight.const_data_ptr<T>(), bias.const_data_ptr<T>());
    backward(shape, grad_out.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), weights,
             grad_x.mutable_data_ptr<scalar_t>(), grad_weight.mutable_data_ptr<T>(), grad_bias.mutable_data_ptr<T>());
  });
  return {grad_x, grad_weight.sum(0).view_as(weight), grad_bias.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("downsampling_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "downsampling_conv_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(spatial_mamba_cpu, CPU, m) {
  m.impl("downsampling_conv", &downsampling_conv);
  m.impl("downsampling_conv_backward", &downsampling_conv_backward);
}

}  // namespace spatial_mamba
