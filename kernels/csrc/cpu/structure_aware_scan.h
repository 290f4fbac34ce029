// The scan, state fusion and read-out of one vector of channels of one image.
//
// The states are kept in a ring with the rows that fusion reads, which stays in the cache. Maps of deltas, decays and
// padded states are never stored.
#pragma once

#include <cmath>
#include <vector>

#include "fusion.h"
#include "passes.h"
#include "transpose.h"
#include "vec.h"

namespace spatial_mamba {

// Shapes and weights of the forward and the backward pass.
template <typename T>
struct Core : Map {
  Core(const Shape& shape, const at::Tensor& step_weight, const at::Tensor& step_bias, const at::Tensor& A_log,
       const at::Tensor& D, const at::Tensor& taps, at::IntArrayRef offsets)
      : Map(shape, offsets),
        rank(step_weight.size(1)),
        step_weight(step_weight.const_data_ptr<T>()),
        step_bias(step_bias.const_data_ptr<T>()),
        A_log(A_log.const_data_ptr<T>()),
        D(D.const_data_ptr<T>()),
        taps(taps.const_data_ptr<T>()) {}

  int64_t rank;
  const T* step_weight;
  const T* step_bias;
  const T* A_log;
  const T* D;
  const T* taps;
};

// The weights of one vector of n channels. Deltas are stored to base 2, s = log2(1 + 2^x) = delta / ln 2, which saves
// conversions around the exponentials: the decay is 2^(s A), and delta B u is s (ln 2 B) u.
template <typename T>
struct ChannelWeights {
  ChannelWeights(const Core<T>& core, int64_t channel, int n)
      : bias(load(core.step_bias + channel, n) * T(M_LOG2E)),
        A(-exp(load(core.A_log + channel, n))),
        D(load(core.D + channel, n)),
        step(core.rank),
        taps(load_taps(core, core.taps, channel, n)) {
    std::fill_n(step.data(), core.rank, Vec<T>{});
    transpose(core.step_weight + channel * core.rank, core.rank, n, core.rank, step.values(), kLanes<T>);
    for (int64_t k = 0; k < core.rank; ++k) step[k] *= T(M_LOG2E);
  }

  static Vec<T> exp(const Vec<T>& x) {
    Vec<T> result[1] = {x * T(M_LOG2E)};
    exp2(result);
    return result[0];
  }

  Vec<T> bias, A, D;
  Vectors<T> step, taps;
};

template <typename T>
std::vector<ChannelWeights<T>> prepare_weights(const Core<T>& core) {
  std::vector<ChannelWeights<T>> weights;
  weights.reserve(core.template chunks<T>());
  for (int64_t channel = 0; channel < core.dim; channel += kLanes<T>) {
    weights.emplace_back(core, channel, core.template lanes<T>(channel));
  }
  return weights;
}

// A row of the projection: per token r, then B, then C.
template <typename T>
struct ProjectionRow {
  const T* r(int64_t j) const { return data + j * (rank + 2); }
  T B(int64_t j) const { return r(j)[rank]; }
  T C(int64_t j) const { return r(j)[rank + 1]; }

  const T* data;
  int64_t rank;
};

// The inputs of one image.
template <typename io>
struct Inputs {
  ProjectionRow<Compute<io>> projection(int64_t i) const { return {projections[i], rank}; }

  Rows<const io> u;
  Rows<const Compute<io>> projections;
  int64_t rank;
};

// The inputs of image b of contiguous maps.
template <typename io>
Inputs<io> inputs_of(const Core<Compute<io>>& core, const io* u, const Compute<io>* projection, int64_t b) {
  return {rows_of(u, core, b, core.dim), rows_of(projection, core, b, core.rank + 2), core.rank};
}

// What the backward pass needs from the scan of a row in addition to the states.
template <typename T>
struct ScanRecord {
  Vec<T>* decays;  // 2^(s A)
  Vec<T>* steps;   // s
  Vec<T>* slopes;  // derivative of delta with respect to its argument
};

template <int n, typename io, typename T>
inline __attribute__((always_inline)) void scan_tokens(const Core<T>& core, const ChannelWeights<T>& weights,
                                                       const ProjectionRow<T>& projection, const io* u, int64_t j,
                                                       int lanes, Vec<T>& h, Vec<T>* states, ScanRecord<T>* record) {
  Vec<T> x[n], e[n], s[n], decay[n];
  each<n>([&](int k) { x[k] = weights.bias; });
  const T* r = projection.r(j);
  for (int64_t rank = 0; rank < core.rank; ++rank) {
    const Vec<T> weight = weights.step[rank];
    each<n>([&](int k) { x[k] += weight * r[k * (core.rank + 2) + rank]; });
  }
  softplus2<T>(x, e, s);
  each<n>([&](int k) { decay[k] = s[k] * weights.A; });
  const int64_t next_row = record ? -core.width : core.width;  // the backward pass goes up the rows
  exp2_nonpositive(decay);
  each<n>([&](int k) {
    const Vec<T> tokens = load(u + (j + k) * core.dim, lanes);
    prefetch(u + (j + k + next_row) * core.dim);
    h = decay[k] * h + s[k] * (tokens * (projection.B(j + k) * T(M_LN2)));
    states[j + k] = h;
  });
  if (record) {
    each<n>([&](int k) {
      record->decays[j + k] = decay[k];
      record->steps[j + k] = s[k];
      record->slopes[j + k] = logistic<T>(x[k], e[k]);
    });
  }
}

// The last tokens of a row, fewer than a block of n.
template <int n, typename... Arguments>
void scan_rest(int64_t count, Arguments&&... arguments) {
  if constexpr (n > 1) {
    if (count == n - 1) return scan_tokens<n - 1>(arguments...);
    scan_rest<n - 1>(count, arguments...);
  }
}

// Runs the recurrence over one row, from the state h before it to the state after it. Blocks of 7 tokens fill the
// registers of AVX-512 and divide the map widths of 224-pixel images.
template <typename io, typename T>
void scan_row(const Core<T>& core, const ChannelWeights<T>& weights, const ProjectionRow<T>& projection, const io* u,
              int lanes, Vec<T>& h, Vec<T>* states, ScanRecord<T>* record = nullptr) {
  constexpr int kBlock = 7;
  int64_t j = 0;
  for (; j + kBlock <= core.width; j += kBlock) {
    scan_tokens<kBlock>(core, weights, projection, u, j, lanes, h, states, record);
  }
  scan_rest<kBlock>(core.width - j, core, weights, projection, u, j, lanes, h, states, record);
}

// The forward pass of one image and one vector of channels, from the first row to the last.
template <typename io, typename out>
class ForwardChannels {
 public:
  using T = Compute<io>;

  ForwardChannels(const Core<T>& core, const ChannelWeights<T>& weights, int64_t channel)
      : core_(core),
        weights_(weights),
        channel_(channel),
        lanes_(core.template lanes<T>(channel)),
        states_(core.ring) {}

  // Starts an image; row_states: (H, dim), the state before each row, or null.
  void start(const Inputs<io>& inputs, const Rows<out>& y, T* row_states) {
    inputs_ = inputs;
    y_ = y;
    row_states_ = row_states;
    h_ = Vec<T>{};
  }

  // Scans row i, if there is one, and finishes the row whose last neighbours are now known.
  void advance(int64_t step) {
    if (step < core_.height) scan(step);
    if (step >= core_.around.row_reach) read_out(step - core_.around.row_reach);
  }

  void finish() {}

 private:
  void scan(int64_t i) {
    if (row_states_) store(row_states_ + i * core_.dim + channel_, h_, lanes_);
    scan_row(core_, weights_, inputs_.projection(i), inputs_.u[i] + channel_, lanes_, h_, states_.row(i));
    states_.repeat_edges(i);
  }

  void read_out(int64_t i) {
    // Local variables, which the compiler keeps in registers.
    const auto projection = inputs_.projection(i);
    const io* u = inputs_.u[i] + channel_;
    out* y = y_[i] + channel_;
    const Vec<T> D = weights_.D;
    const int64_t dim = core_.dim, row = core_.width * dim;
    const int lanes = lanes_;
    for_token_blocks(core_.width, [&](auto n, int64_t j) {
      Vec<T> fused[n];
      fuse(states_.data(), core_.taps_of_rows[i], weights_.taps, j, fused);
      each<n>([&](int k) {
        const int64_t token = (j + k) * dim;
        prefetch_to_write(y + token + row);
        store(y + token, fused[k] * projection.C(j + k) + D * load(u + token, lanes), lanes);
      });
    });
  }

  const Core<T>& core_;
  const ChannelWeights<T>& weights_;
  int64_t channel_;
  int lanes_;
  Inputs<io> inputs_ = {};
  Rows<out> y_ = {};
  T* row_states_ = nullptr;
  RowRing<T> states_;
  Vec<T> h_ = {};
};

}  // namespace spatial_mamba
