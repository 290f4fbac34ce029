// The selective scan in mamba_ssm's layout, and its gradients.
//
// Work is split over the batch and vectors of channels of one group. Tokens are contiguous in memory, so tiles of them
// are transposed to vectors of channels. The backward pass keeps the states before each tile and recomputes those
// within a tile.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "tokens.h"
#include "vec.h"

namespace spatial_mamba {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 64;

template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Shapes and inputs of the forward and the backward pass; absent inputs are null.
template <typename io>
struct Scan {
  using T = Compute<io>;

  Scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const OptionalTensor& C,
       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus)
      : batch(u.size(0)),
        dim(u.size(1)),
        length(u.size(2)),
        d_state(A.size(1)),
        groups(B.size(1)),
        softplus(delta_softplus),
        u(u.const_data_ptr<io>()),
        delta(delta.const_data_ptr<io>()),
        B(B.const_data_ptr<io>()),
        C(pointer<io>(C)),
        z(pointer<io>(z)),
        A(A.const_data_ptr<T>()),
        D(pointer<T>(D)),
        bias(pointer<T>(delta_bias)) {}

  int64_t group_dim() const { return dim / groups; }
  int64_t chunks_per_group() const { return chunks_of<T>(group_dim()); }

  int64_t batch, dim, length, d_state, groups;
  bool softplus;
  const io *u, *delta, *B, *C, *z;
  const T *A, *D, *bias;
};

// A vector of channels of one image: the positions of its data, and the weights that are the same for all tokens.
template <typename io>
struct Channels {
  using T = Compute<io>;

  Channels(const Scan<io>& scan, int64_t item)
      : scan(scan),
        b(item / (scan.groups * scan.chunks_per_group())),
        group(item / scan.chunks_per_group() % scan.groups),
        chunk(item % scan.chunks_per_group()),
        channel(group * scan.group_dim() + chunk * kLanes<T>),
        lanes(static_cast<int>(std::min<int64_t>(kLanes<T>, scan.group_dim() - chunk * kLanes<T>))),
        A(scan.d_state),
        D(scan.D ? load(scan.D + channel, lanes) : Vec<T>{}),
        bias(scan.bias ? load(scan.bias + channel, lanes) : Vec<T>{}) {
    for (int64_t n = 0; n < scan.d_state; ++n) {
      A[n] = Vec<T>{};
      for (int lane = 0; lane < lanes; ++lane) A[n][lane] = scan.A[(channel + lane) * scan.d_state + n];
    }
  }

  int64_t tokens() const { return (b * scan.dim + channel) * scan.length; }                           // of u, delta, z
  int64_t states(int64_t n) const { return tokens() * scan.d_state + n * scan.length; }               // (.., N, L)
  int64_t matrix(int64_t n) const { return ((b * scan.groups + group) * scan.d_state + n) * scan.length; }  // of B, C

  const Scan<io>& scan;
  int64_t b, group, chunk, channel;
  int lanes;
  Vectors<T> A;
  Vec<T> D, bias;
};

// Converts tokens [0, count) of neighbouring channels, `stride` apart, to one vector of channels per token; and back.
template <typename io>
void read_tile(const io* p, int64_t stride, int lanes, int64_t count, Vec<Compute<io>>* tile) {
  using T = Compute<io>;
  std::fill_n(tile, count, Vec<T>{});
  T* values = reinterpret_cast<T*>(tile);
  for (int lane = 0; lane < lanes; ++lane) {
    for (int64_t t = 0; t < count; ++t) values[t * kLanes<T> + lane] = p[lane * stride + t];
  }
}

template <typename io>
void write_tile(io* p, int64_t stride, int lanes, int64_t count, const Vec<Compute<io>>* tile) {
  using T = Compute<io>;
  const T* values = reinterpret_cast<const T*>(tile);
  for (int lane = 0; lane < lanes; ++lane) {
    for (int64_t t = 0; t < count; ++t) p[lane * stride + t] = values[t * kLanes<T> + lane];
  }
}

// The inputs of a tile of tokens, and decays and states for one of the N states at a time.
template <typename io>
struct Tile {
  using T = Compute<io>;

  void read(const Channels<io>& channels, int64_t from) {
    const Scan<io>& scan = channels.scan;
    start = from;
    count = std::min(kTile, scan.length - from);
    read_tile(scan.u + channels.tokens() + from, scan.length, channels.lanes, count, u.data());
    read_tile(scan.delta + channels.tokens() + from, scan.length, channels.lanes, count, delta.data());
    for (int64_t t = 0; t < count; ++t) {
      delta[t] += channels.bias;
      if (scan.softplus) {
        Vec<T> x[1] = {delta[t] * T(M_LOG2E)}, e[1], s[1];
        softplus2<T>(x, e, s);
        delta[t] = s[0] * T(M_LN2);
        slope[t] = logistic<T>(x[0], e[0]);
      }
    }
  }

  // Runs the recurrence of state n over the tile, from the state h before it.
  void run(const Channels<io>& channels, int64_t n, Vec<T>& h) {
    const io* B = channels.scan.B + channels.matrix(n) + start;
    const Vec<T> A = channels.A[n] * T(M_LOG2E);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) step<4>(A, B, t, h);
    for (; t < count; ++t) step<1>(A, B, t, h);
  }

  template <int n>
  void step(const Vec<T>& A, const io* B, int64_t t, Vec<T>& h) {
    Vec<T> decay[n];
    each<n>([&](int k) { decay[k] = delta[t + k] * A; });
    exp2(decay);
    each<n>([&](int k) {
      h = decay[k] * h + delta[t + k] * u[t + k] * static_cast<T>(B[t + k]);
      decays[t + k] = decay[k];
      states[t + k] = h;
    });
  }

  int64_t start = 0, count = 0;
  Vectors<T> u{kTile}, delta{kTile}, slope{kTile}, decays{kTile}, states{kTile};
};

// --- forward ----------------------------------------------------------------------------------------------------------

// out: outputs (batch, dim, L), or null; states: (batch, dim, N, L), if there is no C; last: (batch, dim, N).
template <typename io>
void forward_channels(const Scan<io>& scan, int64_t item, io* out, Compute<io>* states, Compute<io>* last) {
  using T = Compute<io>;
  const Channels<io> channels(scan, item);
  Tile<io> tile;
  Vectors<T> h(scan.d_state), y(kTile), gate(kTile);
  std::fill_n(h.data(), scan.d_state, Vec<T>{});

  for (int64_t start = 0; start < scan.length; start += kTile) {
    tile.read(channels, start);
    for (int64_t t = 0; t < tile.count; ++t) y[t] = channels.D * tile.u[t];
    for (int64_t n = 0; n < scan.d_state; ++n) {
      tile.run(channels, n, h[n]);
      if (scan.C) {
        const io* C = scan.C + channels.matrix(n) + start;
        for (int64_t t = 0; t < tile.count; ++t) y[t] += tile.states[t] * static_cast<T>(C[t]);
      } else {
        write_tile(states + channels.states(n) + start, scan.d_state * scan.length, channels.lanes, tile.count,
                   tile.states.data());
      }
    }
    if (scan.z) {
      read_tile(scan.z + channels.tokens() + start, scan.length, channels.lanes, tile.count, gate.data());
      for (int64_t t = 0; t < tile.count; ++t) y[t] *= gate[t] * logistic<T>(gate[t]);
    }
    if (scan.C) write_tile(out + channels.tokens() + start, scan.length, channels.lanes, tile.count, y.data());
  }
  for (int64_t n = 0; n < scan.d_state; ++n) {
    for (int lane = 0; lane < channels.lanes; ++lane) {
      last[(channels.b * scan.dim + channels.channel + lane) * scan.d_state + n] = h[n][lane];
    }
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------

// Gradients: of weights per image, of B and C per vector of channels, to be summed afterwards. They are null for absent
// inputs.
template <typename io>
struct ScanGradients {
  using T = Compute<io>;
  io *u, *delta, *z;
  T *A, *D, *bias;  // (batch, dim, N), (batch, dim), (batch, dim)
  T *B, *C;         // (chunks, batch, groups, N, L)
};

template <typename io>
class BackwardChannels {
 public:
  using T = Compute<io>;

  // grad_out: (batch, dim, L), or grad_states: (batch, dim, N, L), whichever the forward pass returned.
  BackwardChannels(const Scan<io>& scan, int64_t item, const io* grad_out, const T* grad_states, const T* grad_last,
                   const ScanGradients<io>& grads)
      : scan_(scan), channels_(scan, item), grad_out_(grad_out), grad_states_(grad_states), grads_(grads) {
    for (int64_t n = 0; n < scan.d_state; ++n) {
      carry_[n] = grad_A_[n] = Vec<T>{};
      for (int lane = 0; lane < channels_.lanes; ++lane) carry_[n][lane] = grad_last[weight(lane) * scan.d_state + n];
    }
  }

  void run() {
    record_tiles();
    for (int64_t tile = tiles() - 1; tile >= 0; --tile) backward_tile(tile);
    for (int lane = 0; lane < channels_.lanes; ++lane) {
      for (int64_t n = 0; n < scan_.d_state; ++n) grads_.A[weight(lane) * scan_.d_state + n] = grad_A_[n][lane];
    }
    if (grads_.D) store(grads_.D + weight(0), grad_D_, channels_.lanes);
    if (grads_.bias) store(grads_.bias + weight(0), grad_bias_, channels_.lanes);
  }

 private:
  int64_t tiles() const { return at::divup(scan_.length, kTile); }
  int64_t weight(int lane) const { return channels_.b * scan_.dim + channels_.channel + lane; }

  // Keeps the states before every tile.
  void record_tiles() {
    Vectors<T> h(scan_.d_state);
    std::fill_n(h.data(), scan_.d_state, Vec<T>{});
    for (int64_t i = 0; i < tiles(); ++i) {
      std::copy_n(h.data(), scan_.d_state, &in_front_[i * scan_.d_state]);
      if (i + 1 == tiles()) break;
      tile_.read(channels_, i * kTile);
      for (int64_t n = 0; n < scan_.d_state; ++n) tile_.run(channels_, n, h[n]);
    }
  }

  void backward_tile(int64_t i) {
    tile_.read(channels_, i * kTile);
    if (scan_.C) {
      read_tile(grad_out_ + channels_.tokens() + tile_.start, scan_.length, channels_.lanes, tile_.count,
                grad_y_.data());
      if (scan_.z) gate_backward(i);
    }
    for (int64_t t = 0; t < tile_.count; ++t) {
      grad_u_[t] = scan_.C ? grad_y_[t] * channels_.D : Vec<T>{};
      grad_delta_[t] = Vec<T>{};
      if (grads_.D) grad_D_ += grad_y_[t] * tile_.u[t];
    }
    for (int64_t n = 0; n < scan_.d_state; ++n) state_backward(i, n);
    for (int64_t t = 0; t < tile_.count; ++t) {
      if (scan_.softplus) grad_delta_[t] *= tile_.slope[t];
      grad_bias_ += grad_delta_[t];
    }
    const int64_t tokens = channels_.tokens() + tile_.start;
    write_tile(grads_.u + tokens, scan_.length, channels_.lanes, tile_.count, grad_u_.data());
    write_tile(grads_.delta + tokens, scan_.length, channels_.lanes, tile_.count, grad_delta_.data());
  }

  // Gradients of z and of the outputs before the gate; the outputs are recomputed.
  void gate_backward(int64_t i) {
    for (int64_t t = 0; t < tile_.count; ++t) y_[t] = channels_.D * tile_.u[t];
    for (int64_t n = 0; n < scan_.d_state; ++n) {
      Vec<T> h = in_front_[i * scan_.d_state + n];
      tile_.run(channels_, n, h);
      const io* C = scan_.C + channels_.matrix(n) + tile_.start;
      for (int64_t t = 0; t < tile_.count; ++t) y_[t] += tile_.states[t] * static_cast<T>(C[t]);
    }
    const int64_t tokens = channels_.tokens() + tile_.start;
    read_tile(scan_.z + tokens, scan_.length, channels_.lanes, tile_.count, z_.data());
    for (int64_t t = 0; t < tile_.count; ++t) {
      const Vec<T> sigmoid = logistic<T>(z_[t]), z = z_[t];
      z_[t] = grad_y_[t] * y_[t] * (sigmoid * (T(1) + z * (T(1) - sigmoid)));
      grad_y_[t] *= z * sigmoid;
    }
    write_tile(grads_.z + tokens, scan_.length, channels_.lanes, tile_.count, z_.data());
  }

  void state_backward(int64_t i, int64_t n) {
    const Vec<T> in_front = in_front_[i * scan_.d_state + n];
    Vec<T> h = in_front;
    tile_.run(channels_, n, h);
    const io* B = scan_.B + channels_.matrix(n) + tile_.start;
    const io* C = scan_.C ? scan_.C + channels_.matrix(n) + tile_.start : nullptr;
    const int64_t rows = scan_.batch * scan_.groups * scan_.d_state * scan_.length;
    const int64_t row = channels_.chunk * rows + channels_.matrix(n) + tile_.start;
    if (!C) {
      read_tile(grad_states_ + channels_.states(n) + tile_.start, scan_.d_state * scan_.length, channels_.lanes,
                tile_.count, grad_y_.data());
    }
    for (int64_t t = tile_.count - 1; t >= 0; --t) {
      const Vec<T> grad_h = carry_[n] + (C ? grad_y_[t] * static_cast<T>(C[t]) : grad_y_[t]);
      carry_[n] = tile_.decays[t] * grad_h;
      const Vec<T> grad_exponent = carry_[n] * (t > 0 ? tile_.states[t - 1] : in_front);  // of delta A
      const Vec<T> grad_input = grad_h * tile_.delta[t];                                  // of B u
      grad_A_[n] += grad_exponent * tile_.delta[t];
      grad_delta_[t] += grad_exponent * channels_.A[n] + grad_h * tile_.u[t] * static_cast<T>(B[t]);
      grad_u_[t] += grad_input * static_cast<T>(B[t]);
      grads_.B[row + t] = sum<T>(grad_input * tile_.u[t]);
      if (C) grads_.C[row + t] = sum<T>(grad_y_[t] * tile_.states[t]);
    }
  }

  const Scan<io>& scan_;
  Channels<io> channels_;
  const io* grad_out_;
  const T* grad_states_;
  const ScanGradients<io>& grads_;
  Tile<io> tile_;
  Vectors<T> in_front_{tiles() * scan_.d_state}, carry_{scan_.d_state}, grad_A_{scan_.d_state};
  Vectors<T> grad_y_{kTile}, grad_u_{kTile}, grad_delta_{kTile}, y_{kTile}, z_{kTile};
  Vec<T> grad_D_ = {}, grad_bias_ = {};
};

// --- tensors ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                          const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                          const OptionalTensor& delta_bias, bool delta_softplus) {
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), d_state = A.size(1);
  Tensor out = C ? at::empty_like(u) : at::empty({batch, dim, d_state, length}, A.options());
  Tensor last = at::empty({batch, dim, d_state}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan", [&] {
    using T = Compute<scalar_t>;
    const Scan<scalar_t> scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
    scalar_t* outputs = C ? out.mutable_data_ptr<scalar_t>() : nullptr;
    T* states = C ? nullptr : out.mutable_data_ptr<T>();
    T* last_states = last.mutable_data_ptr<T>();
    for_items(batch * scan.groups * scan.chunks_per_group(), 1,
              [&](int64_t item) { forward_channels(scan, item, outputs, states, last_states); });
  });
  return {out, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_out, const Tensor& grad_last, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus) {
  const int64_t batch = u.size(0), dim = u.size(1), d_state = A.size(1);
  const auto empty_if_absent = [&](bool present, at::IntArrayRef shape, const at::TensorOptions& options) {
    return present ? at::empty(shape, options) : at::empty({0}, options);
  };
  Tensor grad_u = at::empty_like(u), grad_delta = at::empty_like(delta), grad_B, grad_C;
  Tensor grad_z = empty_if_absent(z.has_value(), u.sizes(), u.options());
  Tensor grad_A = at::empty({batch, dim, d_state}, A.options());
  Tensor grad_D = empty_if_absent(D.has_value(), {batch, dim}, A.options());
  Tensor grad_bias = empty_if_absent(delta_bias.has_value(), {batch, dim}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan_backward", [&] {
    using T = Compute<scalar_t>;
    const Scan<scalar_t> scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
    const std::vector<int64_t> matrices{scan.chunks_per_group(), batch, scan.groups, d_state, scan.length};
    grad_B = at::empty(matrices, A.options());
    grad_C = empty_if_absent(C.has_value(), matrices, A.options());
    const ScanGradients<scalar_t> grads{grad_u.mutable_data_ptr<scalar_t>(),
                                        grad_delta.mutable_data_ptr<scalar_t>(),
                                        z ? grad_z.mutable_data_ptr<scalar_t>() : nullptr,
                                        grad_A.mutable_data_ptr<T>(),
                                        D ? grad_D.mutable_data_ptr<T>() : nullptr,
                                        delta_bias ? grad_bias.mutable_data_ptr<T>() : nullptr,
                                        grad_B.mutable_data_ptr<T>(),
                                        C ? grad_C.mutable_data_ptr<T>() : nullptr};
    const scalar_t* grad_outputs = C ? grad_out.const_data_ptr<scalar_t>() : nullptr;
    const T* grad_states = C ? nullptr : grad_out.const_data_ptr<T>();
    const T* grad_last_states = grad_last.const_data_ptr<T>();
    for_items(batch * scan.groups * scan.chunks_per_group(), 1, [&](int64_t item) {
      BackwardChannels<scalar_t>(scan, item, grad_outputs, grad_states, grad_last_states, grads).run();
    });
  });
  const auto summed = [&](bool present, const Tensor& parts, at::ScalarType dtype) {
    return present ? parts.sum(0).to(dtype) : parts;
  };
  const auto weights = A.scalar_type(), tokens = u.scalar_type();
  return {grad_u,
          grad_delta,
          summed(true, grad_A, weights),
          summed(true, grad_B, tokens),
          summed(C.has_value(), grad_C, tokens),
          summed(D.has_value(), grad_D, weights),
          grad_z,
          summed(delta_bias.has_value(), grad_bias, weights)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("selective_scan", torch::dispatch(at::kCPU, &selective_scan));
  m.def("selective_scan_backward", torch::dispatch(at::kCPU, &selective_scan_backward));
}

}  // namespace spatial_mamba
