// State fusion on its own: forward, and the gradients of the states and the taps.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "fusion.h"
#include "passes.h"
#include "vec.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

template <typename io>
class FuseChannels {
 public:
  using T = Compute<io>;

  FuseChannels(const Map& map, int64_t b, int64_t channel, const io* h, const T* taps, io* fused)
      : map_(map),
        b_(b),
        channel_(channel),
        lanes_(map.lanes<T>(channel)),
        h_(h),
        fused_(fused),
        weights_(load_taps(map, taps, channel, lanes_)),
        states_(map.ring) {}

  void advance(int64_t step) {
    if (step < map_.height) read(step);
    if (step >= map_.around.row_reach) fuse_row(step - map_.around.row_reach);
  }

  void finish() {}

 private:
  int64_t first(int64_t i) const { return map_.token(b_, i) * map_.dim + channel_; }

  void read(int64_t i) {
    Vec<T>* states = states_.row(i);
    for (int64_t j = 0; j < map_.width; ++j) states[j] = load(h_ + first(i) + j * map_.dim, lanes_);
    states_.repeat_edges(i);
  }

  void fuse_row(int64_t i) {
    for_token_blocks(map_.width, [&](auto n, int64_t j) {
      Vec<T> fused[n];
      fuse(states_.data(), map_.taps_of_rows[i], weights_, j, fused);
      each<n>([&](int k) { store(fused_ + first(i) + (j + k) * map_.dim, fused[k], lanes_); });
    });
  }

  const Map& map_;
  int64_t b_, channel_;
  int lanes_;
  const io* h_;
  io* fused_;
  Vectors<T> weights_;
  RowRing<T> states_;
};

template <typename io>
class FuseChannelsBackward {
 public:
  using T = Compute<io>;

  // grad_taps: (batch, T, dim), to be summed over the batch afterwards.
  FuseChannelsBackward(const Map& map, const std::vector<Taps>& adjoint_taps, int64_t b, int64_t channel,
                       const io* grad_out, const io* h, const T* taps, io* grad_h, T* grad_taps)
      : map_(map),
        adjoint_taps_(adjoint_taps),
        b_(b),
        channel_(channel),
        lanes_(map.lanes<T>(channel)),
        grad_out_(grad_out),
        h_(h),
        grad_h_(grad_h),
        grad_taps_(grad_taps),
        weights_(load_taps(map, taps, channel, lanes_)),
        states_(map.ring),
        grads_(map.ring),
        grad_weights_(map.around.size()),
        grad_states_(map.width) {
    std::fill_n(grad_weights_.data(), map.around.size(), Vec<T>{});
  }

  void advance(int64_t step) {
    if (step < map_.height) read(step);
    if (step < map_.around.row_reach) return;
    taps_backward(step - map_.around.row_reach);
    states_backward(step - map_.around.row_reach);
  }

  void finish() {
    for (int64_t t = 0; t < map_.around.size(); ++t) {
      store(grad_taps_ + (b_ * map_.around.size() + t) * map_.dim + channel_, grad_weights_[t], lanes_);
    }
  }

 private:
  int64_t first(int64_t i) const { return map_.token(b_, i) * map_.dim + channel_; }

  void read(int64_t i) {
    Vec<T>*states = states_.row(i), *grads = grads_.row(i);
    for (int64_t j = 0; j < map_.width; ++j) {
      states[j] = load(h_ + first(i) + j * map_.dim, lanes_);
      grads[j] = load(grad_out_ + first(i) + j * map_.dim, lanes_);
    }
    states_.repeat_edges(i);
  }

  void taps_backward(int64_t i) {
    const Vec<T>* grads = grads_.row(i);
    for (const auto& tap : map_.taps_of_rows[i]) {
      const Vec<T>* tokens = states_.data() + tap.start;
      for (int64_t j = 0; j < map_.width; ++j) grad_weights_[tap.t] += grads[j] * tokens[j];
    }
  }

  void states_backward(int64_t i) {
    fuse_adjoint(map_.around, grads_.data(), adjoint_taps_[i], weights_, map_.width, grad_states_.data());
    for (int64_t j = 0; j < map_.width; ++j) store(grad_h_ + first(i) + j * map_.dim, grad_states_[j], lanes_);
  }

  const Map& map_;
  const std::vector<Taps>& adjoint_taps_;
  int64_t b_, channel_;
  int lanes_;
  const io *grad_out_, *h_;
  io* grad_h_;
  T* grad_taps_;
  Vectors<T> weights_;
  RowRing<T> states_, grads_;
  Vectors<T> grad_weights_, grad_states_;
};

Tensor state_fusion(const Tensor& h, const Tensor& taps, at::IntArrayRef offsets) {
  const Map map(shape_of(h), offsets);
  Tensor fused = at::empty_like(h);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "state_fusion", [&] {
    using T = Compute<scalar_t>;
    const auto* states = h.const_data_ptr<scalar_t>();
    const auto* weights = taps.const_data_ptr<T>();
    auto* out = fused.mutable_data_ptr<scalar_t>();
    run_passes<T>(map, channel_groups<T>(map), [&](int64_t b, int64_t channel, int64_t) {
      return FuseChannels<scalar_t>(map, b, channel, states, weights, out);
    });
  });
  return fused;
}

std::tuple<Tensor, Tensor> state_fusion_backward(const Tensor& grad_out, const Tensor& h, const Tensor& taps,
                                                 at::IntArrayRef offsets) {
  const Map map(shape_of(h), offsets);
  Tensor grad_h = at::empty_like(h), grad_taps = at::empty({h.size(0), taps.size(0), taps.size(1)}, taps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "state_fusion_backward", [&] {
    using T = Compute<scalar_t>;
    const auto adjoint_taps = find_adjoint_taps(map.around, map.ring, map.height);
    const auto *grad = grad_out.const_data_ptr<scalar_t>(), *states = h.const_data_ptr<scalar_t>();
    const auto* weights = taps.const_data_ptr<T>();
    auto* grad_states = grad_h.mutable_data_ptr<scalar_t>();
    auto* grad_weights = grad_taps.mutable_data_ptr<T>();
    run_passes<T>(map, channel_groups<T>(map), [&](int64_t b, int64_t channel, int64_t) {
      return FuseChannelsBackward<scalar_t>(map, adjoint_taps, b, channel, grad, states, weights, grad_states,
                                            grad_weights);
    });
  });
  return {grad_h, grad_taps.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("state_fusion", torch::dispatch(at::kCPU, &state_fusion));
  m.def("state_fusion_backward", torch::dispatch(at::kCPU, &state_fusion_backward));
}

}  // namespace spatial_mamba
