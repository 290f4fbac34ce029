// Downsampling between stages: a linear layer, ReLU, depthwise 3x3 convolution of stride 2, ReLU, and another linear
// layer; and the gradients. The wide hidden map is computed for some images and channels at a time, so that it stays in
// the cache. Nothing is kept for the gradients.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "downsampling_row.h"
#include "product.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kHiddenBytes = 1 << 20;  // of the hidden map in a part, per thread, except in half precision
constexpr int64_t kChannels = 64;          // of a part are a multiple of this, so that its rows start at cache lines

// Calls visit(first image, images, first channel, channels) for parts of the hidden map of `shape`.
template <typename io, typename Visit>
void for_parts(const Shape& shape, Visit&& visit) {
  const int64_t tokens = shape.height * shape.width;
  if (shape.batch * tokens == 0) return;
  const auto split = [](int64_t all, int64_t most) { return at::divup(all, at::divup(all, std::max<int64_t>(most, 1))); };
  const int64_t images = split(shape.batch, at::divup(tile_size(shape.batch * tokens), tokens));
  int64_t channels = shape.dim;
  // In half precision, sums over channels would be rounded after each part.
  if (sizeof(io) > 2) {
    const int64_t most = kHiddenBytes * at::get_num_threads() / (images * tokens * static_cast<int64_t>(sizeof(io)));
    channels = at::divup(split(shape.dim, most), kChannels) * kChannels;
  }
  for_tiles(shape.batch, images, [&](int64_t b, int64_t count) {
    for_tiles(shape.dim, channels, [&](int64_t channel, int64_t width) { visit(b, count, channel, width); });
  });
}

// sampled: the outputs of the convolution of `hidden`, both contiguous.
template <typename io>
void convolve(const Shape& shape, const io* hidden, const Weights<Compute<io>>& weights, io* sampled) {
  const Shape outputs = halved(shape);
  const std::vector<io> zeros(shape.dim, io(0));
  for_items(outputs.batch * outputs.height, 1, [&](int64_t line) {
    const io* image = hidden + shape.token(line / outputs.height, 0) * shape.dim;
    const auto row = [&](int64_t i) { return image + i * shape.width * shape.dim; };
    downsample_row(shape, row, line % outputs.height, weights, zeros.data(), sampled + line * outputs.width * shape.dim);
  });
}

// Gradients of one image, for a few neighbouring vectors of channels. The gradients of the sums are kept in a ring of
// two rows of outputs; then those of the two rows of inputs between them can be computed, and replace the inputs.
// Likewise, the outputs replace their gradients in `sampled`.
template <typename io>
class BackwardTile {
 public:
  using T = Compute<io>;

  BackwardTile(const Shape& shape, int64_t b, int64_t first, int64_t last, io* hidden, io* sampled,
               const Weights<T>& weights, const std::vector<io>& zeros)
      : shape_(shape),
        outputs_(halved(shape)),
        b_(b),
        first_(first),
        count_(last - first),
        hidden_(hidden),
        sampled_(sampled),
        weights_(weights),
        zeros_(zeros),
        ring_(2 * (outputs_.width + 1) * count_),
        sums_(count_ * (kTaps + 1)),
        input_sums_(count_) {
    std::fill_n(ring_.data(), 2 * (outputs_.width + 1) * count_, Vec<T>{});  // a column beyond the last stays 0
    std::fill_n(sums_.data(), count_ * (kTaps + 1), Vec<T>{});
    std::fill_n(input_sums_.data(), count_, Vec<T>{});
  }

  void run() {
    for (int64_t i = 0; i <= outputs_.height; ++i) {
      if (i < outputs_.height) {
        for (int64_t j = 0; j < outputs_.width; ++j) before_relu(i, j);
      } else {
        std::fill_n(grads(i, 0), outputs_.width * count_, Vec<T>{});
      }
      if (i == 0) continue;
      for (int64_t j = 0; j < outputs_.width; ++j) inputs(i - 1, j);
    }
  }

  // grad_weight: (dim, 9), grad_bias: (dim,), and grad_inputs: (dim,), the sums of the inputs' gradients; of this image.
  void write_sums(T* grad_weight, T* grad_bias, T* grad_inputs) const {
    write_weight_gradients<T>(shape_, first_, count_, sums_.data(), grad_weight, grad_bias);
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      store(grad_inputs + channel, input_sums_[c], shape_.lanes<T>(channel));
    }
  }

 private:
  Vec<T>* grads(int64_t i, int64_t j) { return ring_.data() + (i % 2 * (outputs_.width + 1) + j) * count_; }

  void before_relu(int64_t i, int64_t j) {
    const auto row = [&](int64_t k) { return hidden_ + shape_.token(b_, k) * shape_.dim; };
    const auto around = inputs_of<io>(shape_, row, i, j, zeros_.data());
    for (int64_t c = 0; c < count_; ++c) {
      const int64_t channel = (first_ + c) * kLanes<T>;
      const int lanes = shape_.lanes<T>(channel);
      const Window<io> window(around, channel, lanes, weights_[first_ + c]);
      io* sampled = sampled_ + (outputs_.token(b_, i) + j) * shape_.dim + channel;
      const Vec<T> grad = window.sum <= 0 ? Vec<T>{} : load(sampled, lanes);
      store(sampled, relu<T>(window.sum), lanes);
      Vec<T>* sums = sums_.data() + c * (kTaps + 1);
      each<kTaps>([&](int k) { sums[k] += grad * window.near[k]; });
      sums[kTaps] += grad;
      grads(i, j)[c] = grad;
    }
  }

  // The 2x2 inputs from (2 i, 2 j) on, which the outputs (i, j) to (i + 1, j + 1) read.
  void inputs(int64_t i, int64_t j) {
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
          io* hidden = hidden_ + (shape_.token(b_, 2 * i + row) + 2 * j + column) * shape_.dim + channel;
          const Vec<T> grad = load(hidden, lanes) <= 0 ? Vec<T>{} : found[row][column];
          input_sums_[c] += grad;
          store(hidden, grad, lanes);
        }
      }
    }
  }

  const Shape& shape_;
  Shape outputs_;
  int64_t b_, first_, count_;
  io *hidden_, *sampled_;
  const Weights<T>& weights_;
  const std::vector<io>& zeros_;
  Vectors<T> ring_, sums_, input_sums_;
};

// Sums over tokens for each image, from the first channel of a part on.
template <typename T>
struct ConvGradients {
  T *weight, *bias, *inputs;
  int64_t dim;  // channels of an image
};

// hidden and sampled: see BackwardTile.
template <typename io>
void convolve_backward(const Shape& shape, io* hidden, const Weights<Compute<io>>& weights, io* sampled,
                       const ConvGradients<Compute<io>>& grads) {
  const std::vector<io> zeros(shape.dim, io(0));
  for_channel_tiles<Compute<io>>(shape, [&](int64_t b, int64_t first, int64_t last) {
    BackwardTile<io> tile(shape, b, first, last, hidden, sampled, weights, zeros);
    tile.run();
    tile.write_sums(grads.weight + b * grads.dim * kTaps, grads.bias + b * grads.dim, grads.inputs + b * grads.dim);
  });
}

// Images of a contiguous map as rows of tokens.
Tensor rows_of_images(const Tensor& x, int64_t first, int64_t count) { return x.narrow(0, first, count).flatten(0, 2); }

// sums += a @ b. If the sums are of a wider type, only the product is rounded.
void add_product(const Tensor& a, const Tensor& b, Tensor sums) {
  if (sums.scalar_type() == a.scalar_type()) {
    product(a, b, sums, sums);
  } else {
    sums.add_(at::mm(a, b));
  }
}

Tensor downsampling(const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& conv_weight,
                    const Tensor& conv_bias, const Tensor& project, const Tensor& project_bias) {
  const Shape shape = shape_of(x);
  const Shape hidden{shape.batch, shape.height, shape.width, expand.size(0)}, sampled = halved(hidden);
  Tensor out = at::empty({sampled.batch, sampled.height, sampled.width, project.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "downsampling", [&] {
    using T = Compute<scalar_t>;
    for_parts<scalar_t>(hidden, [&](int64_t b, int64_t images, int64_t channel, int64_t channels) {
      const Shape part{images, shape.height, shape.width, channels};
      const Weights<T> weights(part, conv_weight.const_data_ptr<T>() + channel * kTaps,
                               conv_bias.const_data_ptr<T>() + channel);
      Tensor before = at::empty({images * shape.height * shape.width, channels}, x.options());
      Tensor after = at::empty({images * sampled.height * sampled.width, channels}, x.options());
      product(rows_of_images(x, b, images), expand.narrow(0, channel, channels).t(), before,
              expand_bias.narrow(0, channel, channels));
      convolve(part, before.const_data_ptr<scalar_t>(), weights, after.mutable_data_ptr<scalar_t>());
      const Tensor to = rows_of_images(out, b, images);
      product(after, project.narrow(1, channel, channels).t(), to, channel > 0 ? to : project_bias);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> downsampling_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& conv_weight,
    const Tensor& conv_bias, const Tensor& project) {
  const Shape shape = shape_of(x);
  const Shape hidden{shape.batch, shape.height, shape.width, expand.size(0)}, sampled = halved(hidden);
  const auto sums = conv_weight.options();
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_expand = at::zeros(expand.sizes(), sums), grad_project = at::zeros(project.sizes(), sums);
  Tensor grad_conv_weight = at::empty({hidden.batch, hidden.dim, kTaps}, sums);
  Tensor grad_conv_bias = at::empty({hidden.batch, hidden.dim}, sums);
  Tensor grad_expand_bias = at::empty({hidden.batch, hidden.dim}, sums);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "downsampling_backward", [&] {
    using T = Compute<scalar_t>;
    for_parts<scalar_t>(hidden, [&](int64_t b, int64_t images, int64_t channel, int64_t channels) {
      const Shape part{images, shape.height, shape.width, channels};
      const Weights<T> weights(part, conv_weight.const_data_ptr<T>() + channel * kTaps,
                               conv_bias.const_data_ptr<T>() + channel);
      const Tensor tokens = rows_of_images(x, b, images), grads = rows_of_images(grad_out, b, images);
      const Tensor to_hidden = expand.narrow(0, channel, channels), from_hidden = project.narrow(1, channel, channels);
      // The convolution's gradients replace its inputs, and its outputs replace their gradients.
      Tensor before = at::empty({images * shape.height * shape.width, channels}, x.options());
      Tensor after = at::empty({images * sampled.height * sampled.width, channels}, x.options());
      product(tokens, to_hidden.t(), before, expand_bias.narrow(0, channel, channels));
      product(grads, from_hidden, after);
      const int64_t first = b * hidden.dim + channel;
      convolve_backward(part, before.mutable_data_ptr<scalar_t>(), weights, after.mutable_data_ptr<scalar_t>(),
                        {grad_conv_weight.mutable_data_ptr<T>() + first * kTaps,
                         grad_conv_bias.mutable_data_ptr<T>() + first, grad_expand_bias.mutable_data_ptr<T>() + first,
                         hidden.dim});
      add_product(grads.t(), after, grad_project.narrow(1, channel, channels));
      add_product(before.t(), tokens, grad_expand.narrow(0, channel, channels));
      const Tensor to = rows_of_images(grad_x, b, images);
      product(before, to_hidden, to, channel > 0 ? to : Tensor());
    });
  });
  const auto dtype = x.scalar_type();
  return {grad_x,
          grad_expand.to(dtype),
          grad_expand_bias.sum(0).to(dtype),
          grad_conv_weight.sum(0).view_as(conv_weight),
          grad_conv_bias.sum(0),
          grad_project.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("downsampling", torch::dispatch(at::kCPU, &downsampling));
  m.def("downsampling_backward", torch::dispatch(at::kCPU, &downsampling_backward));
}

}  // namespace spatial_mamba
