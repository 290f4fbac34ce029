// Scan, state fusion and read-out in one pass over the image, and their gradients in one pass back.
//
// Work is split over images and vectors of channels.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "structure_aware_scan.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

// --- backward ---------------------------------------------------------------------------------------------------------

// Gradients: of weights per image, of the projection per group of channels, to be summed afterwards.
template <typename io>
struct CoreGradients {
  using T = Compute<io>;
  io* u;
  T* projection;   // (groups, batch, L, R + 2)
  T* step_weight;  // (batch, dim, R)
  T* step_bias;    // (batch, dim)
  T* A_log;        // (batch, dim)
  T* D;            // (batch, dim)
  T* taps;         // (batch, T, dim)
};

// The backward pass of one image and one vector of channels, from the last row to the first. A row is finished as soon
// as the rows above it that fusion reads have been recomputed.
template <typename io, typename out>
class BackwardChannels {
 public:
  using T = Compute<io>;

  BackwardChannels(const Core<T>& core, const std::vector<Taps>& adjoint_taps, const ChannelWeights<T>& weights,
                   const Inputs<io>& inputs, int64_t b, int64_t channel, const out* grad_y, const T* row_states,
                   const CoreGradients<io>& grads, T* grad_projection)
      : core_(core),
        adjoint_taps_(adjoint_taps),
        weights_(weights),
        inputs_(inputs),
        b_(b),
        channel_(channel),
        lanes_(core.template lanes<T>(channel)),
        grad_y_(grad_y),
        row_states_(row_states),
        grads_(grads),
        grad_projection_(grad_projection),
        states_(core.ring),
        grad_fused_(core.ring),
        decays_({core.around.row_reach + 1, core.width, 0}),
        steps_({core.around.row_reach + 1, core.width, 0}),
        slopes_({core.around.row_reach + 1, core.width, 0}),
        grad_states_(core.width),
        grad_x_(core.width),
        grad_step_(core.rank),
        grad_taps_(core.around.size()) {
    std::fill_n(grad_step_.data(), core.rank, Vec<T>{});
    std::fill_n(grad_taps_.data(), core.around.size(), Vec<T>{});
  }

  // Recomputes a row, if one is left, and finishes the row whose last neighbours are now known.
  void advance(int64_t step) {
    const int64_t recomputed = core_.height - 1 - step, finished = recomputed + core_.around.row_reach;
    if (recomputed >= 0) recompute(recomputed);
    if (finished >= core_.height) return;
    read_out_backward(finished);
    fusion_backward(finished);
    scan_backward(finished);
    step_backward(finished);
  }

  // Writes the gradients of the weights, after the last step.
  void finish() {
    const int64_t channel = b_ * core_.dim + channel_;
    store(grads_.step_bias + channel, grad_bias_, lanes_);
    store(grads_.A_log + channel, grad_A_log_, lanes_);
    store(grads_.D + channel, grad_D_, lanes_);
    for (int64_t k = 0; k < core_.rank; ++k) {
      for (int c = 0; c < lanes_; ++c) grads_.step_weight[(channel + c) * core_.rank + k] = grad_step_[k][c];
    }
    for (int64_t t = 0; t < core_.around.size(); ++t) {
      store(grads_.taps + (b_ * core_.around.size() + t) * core_.dim + channel_, grad_taps_[t], lanes_);
    }
  }

 private:
  int64_t first(int64_t i) const { return core_.token(b_, i) * core_.dim + channel_; }
  T* grad_projection(int64_t i, int64_t j) const {
    return grad_projection_ + (core_.token(b_, i) + j) * (core_.rank + 2);
  }

  // The states of row i, and the gradients of its fused states.
  void recompute(int64_t i) {
    const auto projection = inputs_.projection(i);
    Vec<T> h = load(row_states_ + (b_ * core_.height + i) * core_.dim + channel_, lanes_);
    ScanRecord<T> record{decays_.row(i), steps_.row(i), slopes_.row(i)};
    scan_row(core_, weights_, projection, inputs_.u[i] + channel_, lanes_, h, states_.row(i), &record);
    states_.repeat_edges(i);
    Vec<T>* grad_fused = grad_fused_.row(i);
    for (int64_t j = 0; j < core_.width; ++j) {
      const out* grad_y = grad_y_ + first(i) + j * core_.dim;
      prefetch(grad_y - core_.width * core_.dim);
      grad_fused[j] = load(grad_y, lanes_) * projection.C(j);
    }
  }

  // Gradients of C, D and the taps.
  void read_out_backward(int64_t i) {
    const Vec<T>* grad_fused = grad_fused_.row(i);
    // Overlapping blocks would count tokens twice.
    int64_t j = 0;
    for (; j + 7 <= core_.width; j += 7) read_out_tokens_backward<7>(i, j, grad_fused);
    for (; j < core_.width; ++j) read_out_tokens_backward<1>(i, j, grad_fused);
  }

  template <int n>
  void read_out_tokens_backward(int64_t i, int64_t j, const Vec<T>* grad_fused) {
    Vec<T> grad[n], fused[n];
    each<n>([&](int k) { grad[k] = grad_fused[j + k]; });
    fuse_and_correlate(states_.data(), core_.taps_of_rows[i], weights_.taps, j, grad, fused, grad_taps_);
    each<n>([&](int k) {
      const int64_t token = first(i) + (j + k) * core_.dim;
      const Vec<T> grad_y = load(grad_y_ + token, lanes_);
      grad_D_ += grad_y * load(inputs_.u[i] + channel_ + (j + k) * core_.dim, lanes_);
      grad_projection(i, j + k)[core_.rank + 1] += sum<T>(grad_y * fused[k]);
    });
  }

  // Gradients of the states of row i through fusion.
  void fusion_backward(int64_t i) {
    fuse_adjoint(core_.around, grad_fused_.data(), adjoint_taps_[i], weights_.taps, core_.width, grad_states_.data());
  }

  // Runs the recurrence backwards over row i: gradients of u, B, A_log and of the argument x of the softplus.
  void scan_backward(int64_t i) {
    const Vec<T>*states = states_.row(i), *decays = decays_.row(i), *steps = steps_.row(i), *slopes = slopes_.row(i);
    const Vec<T> before = load(row_states_ + (b_ * core_.height + i) * core_.dim + channel_, lanes_);
    // Local variables, which the compiler keeps in registers.
    const Vec<T> A = weights_.A, D = weights_.D;
    const int64_t dim = core_.dim, stride = core_.rank + 2;
    const auto projection = inputs_.projection(i);
    const io* row_u = inputs_.u[i] + channel_;
    const out* row_grad_y = grad_y_ + first(i);
    io* row_grad_u = grads_.u + first(i);
    T* grad_B = grad_projection(i, 0) + core_.rank;
    Vec<T> carry = carry_, grad_bias = grad_bias_, grad_A_log = grad_A_log_;
    for (int64_t j = core_.width - 1; j >= 0; --j) {
      const Vec<T> u = load(row_u + j * dim, lanes_), grad_y = load(row_grad_y + j * dim, lanes_);
      const Vec<T> delta = steps[j] * T(M_LN2), grad_h = grad_states_[j] + carry;
      const T B = projection.B(j);
      carry = decays[j] * grad_h;
      const Vec<T> grad_exponent = carry * (j > 0 ? states[j - 1] : before);  // of delta A
      const Vec<T> grad_input = grad_h * delta;                               // of B u
      const Vec<T> grad_x = (grad_exponent * A + grad_h * (u * B)) * slopes[j];
      grad_A_log += grad_exponent * delta * A;
      grad_bias += grad_x;
      grad_x_[j] = grad_x;
      prefetch_to_write(row_grad_u + (j - core_.width) * dim);
      store(row_grad_u + j * dim, grad_input * B + grad_y * D, lanes_);
      grad_B[j * stride] += sum<T>(grad_input * u);
    }
    carry_ = carry;
    grad_bias_ = grad_bias;
    grad_A_log_ = grad_A_log;
  }

  // Gradients of the low-rank delta r and of step_weight from those of x = step_weight r + bias.
  void step_backward(int64_t i) {
    for (int64_t k = 0; k < core_.rank; k += kLanes<T>) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes<T>, core_.rank - k));
      Vec<T> weights[kLanes<T>] = {};  // per channel, a vector along the rank
      for (int c = 0; c < lanes_; ++c) weights[c] = load(core_.step_weight + (channel_ + c) * core_.rank + k, n);
      for (int64_t j = 0; j < core_.width; ++j) {
        const T* grad_x = reinterpret_cast<const T*>(&grad_x_[j]);
        Vec<T> even = {}, odd = {};
        for (int c = 0; c < kLanes<T>; c += 2) {
          even += weights[c] * grad_x[c];
          odd += weights[c + 1] * grad_x[c + 1];
        }
        const Vec<T> sums = even + odd;
        T* grad_r = grad_projection(i, j) + k;
        if (n == kLanes<T>) {
          narrow(grad_r, widen(grad_r) + sums);
        } else {
          for (int lane = 0; lane < n; ++lane) grad_r[lane] += sums[lane];
        }
      }
    }
    int64_t k = 0;
    for (; k + 4 <= core_.rank; k += 4) step_weight_backward<4>(i, k);
    for (; k < core_.rank; ++k) step_weight_backward<1>(i, k);
  }

  template <int n>
  void step_weight_backward(int64_t i, int64_t rank) {
    const auto projection = inputs_.projection(i);
    Vec<T> sums[n] = {};
    for (int64_t j = 0; j < core_.width; ++j) {
      const T* r = projection.r(j) + rank;
      each<n>([&](int k) { sums[k] += grad_x_[j] * r[k]; });
    }
    each<n>([&](int k) { grad_step_[rank + k] += sums[k]; });
  }

  const Core<T>& core_;
  const std::vector<Taps>& adjoint_taps_;
  const ChannelWeights<T>& weights_;
  const Inputs<io> inputs_;
  int64_t b_, channel_;
  int lanes_;
  const out* grad_y_;
  const T* row_states_;
  const CoreGradients<io>& grads_;
  T* grad_projection_;
  RowRing<T> states_, grad_fused_, decays_, steps_, slopes_;
  Vectors<T> grad_states_, grad_x_, grad_step_, grad_taps_;
  Vec<T> carry_ = {}, grad_bias_ = {}, grad_A_log_ = {}, grad_D_ = {};
};

// --- over all images and channels -------------------------------------------------------------------------------------

template <typename io, typename out>
void forward(const Core<Compute<io>>& core, const io* u, const Compute<io>* projection, out* y,
             Compute<io>* row_states) {
  using T = Compute<io>;
  const auto weights = prepare_weights(core);
  run_passes<T>(core, channel_groups<T>(core), [&](int64_t b, int64_t channel, int64_t) {
    ForwardChannels<io, out> pass(core, weights[channel / kLanes<T>], channel);
    pass.start(inputs_of(core, u, projection, b), rows_of(y, core, b, core.dim),
               row_states + b * core.height * core.dim);
    return pass;
  });
}

template <typename io, typename out>
void backward(const Core<Compute<io>>& core, const io* u, const Compute<io>* projection, const out* grad_y,
              const Compute<io>* row_states, const CoreGradients<io>& grads, int64_t groups) {
  using T = Compute<io>;
  const auto weights = prepare_weights(core);
  const auto adjoint_taps = find_adjoint_taps(core.around, core.ring, core.height);
  const int64_t projection_size = core.batch * core.height * core.width * (core.rank + 2);
  run_passes<T>(core, groups, [&](int64_t b, int64_t channel, int64_t group) {
    return BackwardChannels<io, out>(core, adjoint_taps, weights[channel / kLanes<T>],
                                     inputs_of(core, u, projection, b), b, channel, grad_y, row_states, grads,
                                     grads.projection + group * projection_size);
  });
}

// --- tensors ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> structure_aware_scan(const Tensor& u, const Tensor& projection, const Tensor& step_weight,
                                                const Tensor& step_bias, const Tensor& A_log, const Tensor& D,
                                                const Tensor& taps, at::IntArrayRef offsets, at::ScalarType out_dtype) {
  const auto compute = taps.scalar_type();
  // Outputs of another dtype than that of the tokens or the compute dtype are converted afterwards.
  const bool narrow_output = out_dtype == u.scalar_type();
  Tensor y = at::empty(u.sizes(), u.options().dtype(narrow_output ? out_dtype : compute));
  Tensor row_states = at::empty({u.size(0), u.size(1), u.size(3)}, taps.options());
  const Tensor projected = projection.to(compute);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "structure_aware_scan", [&] {
    using T = Compute<scalar_t>;
    const Core<T> core(shape_of(u), step_weight, step_bias, A_log, D, taps, offsets);
    const auto run = [&](auto* to) {
      forward(core, u.const_data_ptr<scalar_t>(), projected.const_data_ptr<T>(), to, row_states.mutable_data_ptr<T>());
    };
    narrow_output ? run(y.mutable_data_ptr<scalar_t>()) : run(y.mutable_data_ptr<T>());
  });
  return {y.to(out_dtype), row_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> structure_aware_scan_backward(
    const Tensor& grad_out, const Tensor& u, const Tensor& projection, const Tensor& step_weight,
    const Tensor& step_bias, const Tensor& A_log, const Tensor& D, const Tensor& taps, const Tensor& row_states,
    at::IntArrayRef offsets) {
  const bool narrow_output = grad_out.scalar_type() == u.scalar_type();
  const Tensor grad_y = narrow_output ? grad_out : grad_out.to(taps.scalar_type());
  const int64_t batch = u.size(0), dim = u.size(3);
  const auto weights = taps.options();
  const Tensor projected = projection.to(taps.scalar_type());
  Tensor grad_u = at::empty_like(u), grad_projection;
  Tensor grad_step_weight = at::empty({batch, dim, step_weight.size(1)}, weights);
  Tensor grad_step_bias = at::empty({batch, dim}, weights), grad_A_log = at::empty({batch, dim}, weights);
  Tensor grad_D = at::empty({batch, dim}, weights), grad_taps = at::empty({batch, taps.size(0), dim}, weights);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "structure_aware_scan_backward", [&] {
    using T = Compute<scalar_t>;
    const Core<T> core(shape_of(u), step_weight, step_bias, A_log, D, taps, offsets);
    const int64_t groups = channel_groups<T>(core);
    grad_projection = at::zeros({groups, batch, u.size(1), u.size(2), projection.size(3)}, weights);
    const CoreGradients<scalar_t> grads{grad_u.mutable_data_ptr<scalar_t>(),
                                        grad_projection.mutable_data_ptr<T>(),
                                        grad_step_weight.mutable_data_ptr<T>(),
                                        grad_step_bias.mutable_data_ptr<T>(),
                                        grad_A_log.mutable_data_ptr<T>(),
                                        grad_D.mutable_data_ptr<T>(),
                                        grad_taps.mutable_data_ptr<T>()};
    const auto run = [&](const auto* from) {
      backward(core, u.const_data_ptr<scalar_t>(), projected.const_data_ptr<T>(), from, row_states.const_data_ptr<T>(),
               grads, groups);
    };
    narrow_output ? run(grad_y.const_data_ptr<scalar_t>()) : run(grad_y.const_data_ptr<T>());
  });
  return {grad_u,
          grad_projection.sum(0).to(u.scalar_type()),
          grad_step_weight.sum(0),
          grad_step_bias.sum(0),
          grad_A_log.sum(0),
          grad_D.sum(0),
          grad_taps.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def(
      "structure_aware_scan(Tensor u, Tensor projection, Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, "
      "Tensor taps, int[] offsets, ScalarType out_dtype) -> (Tensor, Tensor)",
      torch::dispatch(at::kCPU, &structure_aware_scan));
  m.def("structure_aware_scan_backward", torch::dispatch(at::kCPU, &structure_aware_scan_backward));
}

}  // namespace spatial_mamba
