// Everything between the two linear projections of a block. An image is processed in bands of rows, so that what passes
// between the operators stays in the cache: by one thread, or, if there are too few images, by all.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "convolution.h"
#include "gated_norm.h"
#include "packing.h"
#include "structure_aware_scan.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kBandBytes = 280 << 10;  // of u and y in a band of rows, per thread
constexpr int64_t kBlockTokens = 64;       // to project at a time, at most

// p = u times the transpose of a weight (R + 2, dim), rounded to the type of u.
template <typename io>
class Projection {
 public:
  using T = Compute<io>;

  explicit Projection(const Tensor& weight)
      : outputs_(weight.size(0)), dim_(weight.size(1)), weight_(weight.const_data_ptr<io>()) {
    if (!can_pack(weight.scalar_type()) || dim_ % kPair<io> != 0) return;
    packed_.reset(new io[at::divup(outputs_, kColumns) * kColumns * dim_]);
    pack(weight_, outputs_, dim_, packed_.get());
  }

  // u: (tokens, dim); p: (tokens, R + 2).
  void operator()(const io* u, int64_t tokens, T* p) const {
    if (!packed_) {
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t k = 0; k < outputs_; ++k) {
          p[token * outputs_ + k] = static_cast<io>(dot(u + token * dim_, weight_ + k * dim_));
        }
      }
    } else if constexpr (std::is_same_v<T, float>) {
      for_tiles(tokens, kBlockTokens, [&](int64_t first, int64_t count) {
        const int64_t rest = count % kProductRows;
        if (rest < count) multiply(u, first, count - rest, p);
        if (rest > 0) multiply(u, first + count - rest, rest, p);
      });
      if constexpr (!std::is_same_v<io, T>) {
        for (int64_t k = 0; k < tokens * outputs_; ++k) p[k] = static_cast<io>(p[k]);
      }
    }
  }

 private:
  void multiply(const io* u, int64_t first, int64_t tokens, float* p) const {
    for_tiles(outputs_, kColumns, [&](int64_t column, int64_t columns) {
      multiply_packed(u + first * dim_, tokens, dim_, packed_.get() + column * dim_, columns,
                      p + first * outputs_ + column, outputs_);
    });
  }

  T dot(const io* x, const io* y) const {
    Vec<T> sums[kLockstep] = {};
    for_channels<T>(dim_, [&](auto n, int64_t channel, int lanes) {
      each<n>([&](int k) {
        const int64_t at = channel + k * kLanes<T>;
        sums[k] += load(x + at, lanes) * load(y + at, lanes);
      });
    });
    return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  int64_t outputs_, dim_;
  const io* weight_;
  std::unique_ptr<io[]> packed_;
};

template <typename io>
struct Mixer {
  using T = Compute<io>;

  Tokens<const io> x, gate;
  const Weights<T>& conv;
  const Projection<io>& project;
  const Core<T>& core;
  const std::vector<ChannelWeights<T>>& channels;
  const T *norm_weight, *norm_bias;
  T eps;
  io* out;
  T *y, *row_states;  // null: not kept
};

// Processes one image after the other, on all threads unless it is used by one of them.
template <typename io>
class ImageMixer {
 public:
  using T = Compute<io>;

  ImageMixer(const Mixer<io>& mixer, int64_t threads)
      : mixer_(mixer),
        core_(mixer.core),
        band_(std::clamp<int64_t>(threads * kBandBytes / (core_.width * core_.dim * (sizeof(io) + sizeof(T))), 1,
                                  core_.height)),
        // Of u, fusion reads rows of earlier bands. Whole bands are kept, so that each is contiguous.
        kept_(std::min((core_.around.row_reach + 2 * band_ - 1) / band_ * band_, core_.height)),
        zeros_(core_.dim, io(0)),
        u_(new io[kept_ * core_.width * core_.dim]),
        projection_(new T[kept_ * core_.width * (core_.rank + 2)]),
        y_(mixer.y ? nullptr : new T[band_ * core_.width * core_.dim]) {
    passes_.reserve(mixer.channels.size());
    for (size_t chunk = 0; chunk < mixer.channels.size(); ++chunk) {
      passes_.emplace_back(core_, mixer.channels[chunk], chunk * kLanes<T>);
    }
  }

  void run(int64_t b) {
    const int64_t row = core_.width * core_.dim, projected = core_.width * (core_.rank + 2);
    const Rows<io> u{u_.get(), row, kept_};
    const Rows<T> projection{projection_.get(), projected, kept_};
    const Rows<T> y = mixer_.y ? rows_of(mixer_.y, core_, b, core_.dim) : Rows<T>{y_.get(), row, band_};
    T* row_states = mixer_.row_states ? mixer_.row_states + b * core_.height * core_.dim : nullptr;
    const Inputs<io> inputs{{u.data, row, kept_}, {projection.data, projected, kept_}, core_.rank};
    for (auto& pass : passes_) pass.start(inputs, y, row_states);

    const int64_t reach = core_.around.row_reach, end = core_.height + reach;
    for (int64_t first = 0; first < end; first += band_) {
      const int64_t last = std::min(first + band_, end), read = std::min(last, core_.height);
      at::parallel_for(first, std::max(first, read), 1, [&](int64_t start, int64_t stop) {
        for (int64_t i = start; i < stop; ++i) {
          convolve_row<Epilogue::kSilu>(core_, b, i, mixer_.x, mixer_.conv, zeros_.data(), u[i]);
        }
        const Microkernels scope;
        mixer_.project(u[start], (stop - start) * core_.width, projection[start]);
      });
      at::parallel_for(0, passes_.size(), 1, [&](int64_t start, int64_t stop) {
        for (int64_t chunk = start; chunk < stop; ++chunk) {
          for (int64_t step = first; step < last; ++step) passes_[chunk].advance(step);
        }
      });
      const int64_t finished = std::max<int64_t>(first - reach, 0);
      at::parallel_for(finished, std::max(finished, last - reach), 1, [&](int64_t start, int64_t stop) {
        for (int64_t i = start; i < stop; ++i) finish(b, i, y[i]);
      });
    }
  }

 private:
  void finish(int64_t b, int64_t i, const T* y) {
    const int64_t first = core_.token(b, i);
    normalise_and_gate(0, core_.width, core_.dim, y, {mixer_.gate[first], mixer_.gate.stride}, mixer_.norm_weight,
                       mixer_.norm_bias, mixer_.eps, mixer_.out + first * core_.dim);
  }

  const Mixer<io>& mixer_;
  const Core<T>& core_;
  int64_t band_, kept_;
  std::vector<io> zeros_;
  std::unique_ptr<io[]> u_;
  std::unique_ptr<T[]> projection_, y_;
  std::vector<ForwardChannels<io, T>> passes_;
};

std::tuple<Tensor, Tensor, Tensor> spatial_mixer(const Tensor& x, const Tensor& gate, const Tensor& conv_weight,
                                                 const Tensor& conv_bias, const Tensor& projection_weight,
                                                 const Tensor& step_weight, const Tensor& step_bias,
                                                 const Tensor& A_log, const Tensor& D, const Tensor& taps,
                                                 const Tensor& norm_weight, const Tensor& norm_bias,
                                                 at::IntArrayRef offsets, double eps, bool keep) {
  const Shape shape = shape_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor y = at::empty(keep ? x.sizes() : at::IntArrayRef{0}, taps.options());
  Tensor row_states =
      at::empty(keep ? at::IntArrayRef{shape.batch, shape.height, shape.dim} : at::IntArrayRef{0}, taps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "spatial_mixer", [&] {
    using T = Compute<scalar_t>;
    const Weights<T> conv(shape, conv_weight.const_data_ptr<T>(), conv_bias.const_data_ptr<T>());
    const Projection<scalar_t> project(projection_weight);
    const Core<T> core(shape, step_weight, step_bias, A_log, D, taps, offsets);
    const auto channels = prepare_weights(core);
    const Mixer<scalar_t> mixer{read_tokens<scalar_t>(x, "x"),
                                read_tokens<scalar_t>(gate, "gate"),
                                conv,
                                project,
                                core,
                                channels,
                                norm_weight.const_data_ptr<T>(),
                                norm_bias.const_data_ptr<T>(),
                                static_cast<T>(eps),
                                out.mutable_data_ptr<scalar_t>(),
                                keep ? y.mutable_data_ptr<T>() : nullptr,
                                keep ? row_states.mutable_data_ptr<T>() : nullptr};
    const auto run = [&](int64_t begin, int64_t end, int64_t threads) {
      ImageMixer<scalar_t> images(mixer, threads);
      for (int64_t b = begin; b < end; ++b) images.run(b);
    };
    // Threads that take whole images should be busy for at least three quarters of the time.
    const int64_t threads = at::get_num_threads(), rounds = at::divup(shape.batch, threads);
    if (4 * shape.batch >= 3 * threads * rounds) {
      at::parallel_for(0, shape.batch, 1, [&](int64_t begin, int64_t end) { run(begin, end, 1); });
    } else {
      run(0, shape.batch, threads);
    }
  });
  return {out, y, row_states};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("spatial_mixer", torch::dispatch(at::kCPU, &spatial_mixer));
}

}  // namespace spatial_mamba
