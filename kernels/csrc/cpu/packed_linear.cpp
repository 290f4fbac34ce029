// Linear layers with packed weights for inference, fused with LayerNorm before and bias, GELU and residual sum after
// the layer. Tokens are processed in tiles, so that intermediate results stay in the cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "gelu.h"
#include "matrix_tiles.h"
#include "moments.h"
#include "packing.h"
#include "vec.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kRound = 8;         // tile sizes are multiples of it, since each size needs a generated product
constexpr int64_t kTileTokens = 200;  // their hidden activations fit into the cache, except in the widest layers

// --- tiles ------------------------------------------------------------------------------------------------------------

struct Tiling {
  explicit Tiling(int64_t tokens) : tokens(tokens) {
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = std::max<int64_t>((tokens + kTileTokens - 1) / kTileTokens, 1);
    tiles = (wanted + threads - 1) / threads * threads;  // the same work for every thread
    size = std::max<int64_t>((tokens + tiles - 1) / tiles, 1);
    size = (size + kRound - 1) / kRound * kRound;
    tiles = (tokens + size - 1) / size;
  }
  // Calls visit(first token, number of tokens) for every tile of a thread's range, between set-up and release.
  template <typename Make>
  void run(Make&& make) const {
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      auto visit = make();
      if (has_matrix_tiles()) configure_tiles();
      for (int64_t tile = begin; tile < end; ++tile) visit(tile * size, std::min(size, tokens - tile * size));
      release_microkernels();
      if (has_matrix_tiles()) release_tiles();
    });
  }

  int64_t tokens, tiles, size;
};

template <typename io>
struct Norm {
  const io *weight, *bias;  // null: no normalisation
  float eps;
};

template <typename io>
struct Layer {
  Layer(const Tensor& packed, int64_t outputs, const std::optional<Tensor>& bias)
      : weight(packed.const_data_ptr<io>()),
        bias(bias ? bias->const_data_ptr<io>() : nullptr),
        inputs(packed.size(1)),
        outputs(outputs) {}

  const io *weight, *bias;
  int64_t inputs, outputs;
};

// Normalised tokens of a tile.
template <typename io>
void normalise(const Norm<io>& norm, const io* x, int64_t tokens, int64_t dim, io* out) {
  const auto channels_of = [&](int64_t token) { return x + token * dim; };
  for_moments<float>(0, tokens, dim, norm.eps, channels_of, [&](int64_t token, const Moments<float>& found) {
    for_channels<float>(dim, [&](auto n, int64_t channel, int lanes) {
      each<n>([&](int k) {
        const int64_t at = channel + k * kLanes<float>;
        const Vec<float> normal = (load(x + token * dim + at, lanes) - found.mean) * found.rstd;
        store(out + token * dim + at, normal * load(norm.weight + at, lanes) + load(norm.bias + at, lanes), lanes);
      });
    });
  });
}

// Whether matrix units multiply a tile of tokens, in blocks of kTileRows.
template <typename io>
bool use_matrix_tiles(const Layer<io>& layer, int64_t tokens) {
  return std::is_same_v<io, c10::BFloat16> && has_matrix_tiles() && layer.inputs % kTileInputs == 0 &&
         tokens >= kTileRows;
}

struct Nothing {
  template <typename... Arguments>
  void operator()(Arguments&&...) const {}
};

// Sums of products for 64 outputs of some tokens, in scratch memory.
struct Sums {
  float* data;            // of the tokens from `start` on
  int64_t start, begin, count, first;  // the tokens to finish, and the first output
};

// out (tokens, outputs) = finish(x (tokens, inputs) times the weights + bias); scratch: (max(tokens, 64), 64).
template <typename io, typename Finish>
void apply(const Layer<io>& layer, const io* x, int64_t tokens, float* scratch, io* out, const Finish& finish) {
  const auto finish_token = [&](const Sums& sums, int64_t token) __attribute__((always_inline)) {
    const float* row = sums.data + (token - sums.start) * kColumns;
    io* to = out + token * layer.outputs + sums.first;
    for_channels<float>(std::min(kColumns, layer.outputs - sums.first), [&](auto n, int64_t channel, int lanes) {
      Vec<float> y[n];
      each<n>([&](int k) {
        y[k] = load(row + channel + k * kLanes<float>, lanes);
        if (layer.bias) y[k] += load(layer.bias + sums.first + channel + k * kLanes<float>, lanes);
      });
      finish(n, y, token * layer.outputs + sums.first + channel, lanes);
      each<n>([&](int k) { store(to + channel + k * kLanes<float>, y[k], lanes); });
    });
  };
  const auto finish_all = [&](const Sums& sums) {
    for (int64_t token = sums.begin; token < sums.begin + sums.count; ++token) finish_token(sums, token);
  };

  if constexpr (std::is_same_v<io, c10::BFloat16>) {
    if (use_matrix_tiles(layer, tokens)) {
      const int64_t steps = layer.inputs / kTileInputs * 2, per_step = (kTileRows + steps - 1) / steps;
      Sums last = {}, next = {scratch};
      float* spare = scratch + kTileRows * kColumns;
      for (next.first = 0; next.first < layer.outputs; next.first += kColumns) {
        for_tiles(tokens, kTileRows, [&](int64_t begin, int64_t count) {
          // All blocks have the same number of rows, so the last one may overlap the one before.
          next.start = std::min(begin, tokens - kTileRows);
          next.begin = begin;
          next.count = count;
          multiply_tiles(x + next.start * layer.inputs, layer.inputs, layer.inputs,
                         layer.weight + next.first * layer.inputs, next.data, [&](int64_t step) {
                           const int64_t end = std::min((step + 1) * per_step, last.count);
                           for (int64_t k = step * per_step; k < end; ++k) finish_token(last, last.begin + k);
                         });
          last = next;
          std::swap(next.data, spare);
        });
      }
      return finish_all(last);
    }
  }
  for (int64_t first = 0; first < layer.outputs; first += kColumns) {
    const io* block = layer.weight + first * layer.inputs;
    if constexpr (std::is_same_v<io, float> && std::is_same_v<Finish, Nothing>) {
      if (layer.outputs - first >= kColumns && !layer.bias) {
        multiply_packed(x, tokens, layer.inputs, block, kColumns, out + first, layer.outputs);
        continue;
      }
    }
    multiply_packed(x, tokens, layer.inputs, block, kColumns, scratch, kColumns);
    finish_all({scratch, 0, 0, tokens, first});
  }
  if (std::is_same_v<io, c10::BFloat16> && has_matrix_tiles()) {  // as they were before the microkernels
    release_microkernels();
    configure_tiles();
  }
}

constexpr auto kRelu = [](auto n, auto& y, int64_t, int) {
  each<n>([&](int k) { y[k] = y[k] < 0.0f ? Vec<float>{} : y[k]; });
};

template <typename io>
auto adding(const io* residual) {
  return [residual](auto n, auto& y, int64_t at, int lanes) {
    each<n>([&](int k) { y[k] += load(residual + at + k * kLanes<float>, lanes); });
  };
}

template <typename io>
void linear(const Layer<io>& layer, const Norm<io>& norm, const io* x, bool relu, const io* residual, int64_t tokens,
            io* out) {
  const Tiling tiling(tokens);
  tiling.run([&] {
    return [&, normal = std::unique_ptr<io[]>(norm.weight ? new io[tiling.size * layer.inputs] : nullptr),
            sums = Vectors<float>(std::max(tiling.size, 2 * kTileRows) * kColumns / kLanes<float>)](int64_t token, int64_t count) mutable {
      const io* from = x + token * layer.inputs;
      if (norm.weight) normalise(norm, from, count, layer.inputs, normal.get());
      const auto apply_to_tile = [&](const auto& finish) {
        apply(layer, norm.weight ? normal.get() : from, count, reinterpret_cast<float*>(sums.data()),
              out + token * layer.outputs, finish);
      };
      if (residual) {
        apply_to_tile(adding(residual + token * layer.outputs));
      } else if (relu) {
        apply_to_tile(kRelu);
      } else {
        apply_to_tile(Nothing());
      }
    };
  });
}

template <typename io>
void mlp(const Norm<io>& norm, const Layer<io>& expand, const Layer<io>& project, const io* x, int64_t tokens,
         io* out) {
  const Tiling tiling(tokens);
  const int64_t dim = expand.inputs;
  tiling.run([&] {
    return [&, normal = std::unique_ptr<io[]>(new io[tiling.size * dim]),
            hidden = std::unique_ptr<io[]>(new io[tiling.size * expand.outputs]),
            sums = Vectors<float>(std::max(tiling.size, 2 * kTileRows) * kColumns / kLanes<float>)](int64_t token, int64_t count) mutable {
      auto* scratch = reinterpret_cast<float*>(sums.data());
      normalise(norm, x + token * dim, count, dim, normal.get());
      apply(expand, normal.get(), count, scratch, hidden.get(), [](auto n, auto& y, int64_t, int) { gelu<float, n>(y); });
      apply(project, hidden.get(), count, scratch, out + token * dim, adding(x + token * dim));
    };
  });
}

// --- tensors ----------------------------------------------------------------------------------------------------------

#define DISPATCH(dtype, name, ...)                                                                                   \
  AT_DISPATCH_SWITCH(dtype, name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                                      AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

Tensor pack_weight(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor packed = at::zeros({(outputs + kColumns - 1) / kColumns, inputs, kColumns}, weight.options());
  DISPATCH(weight.scalar_type(), "pack_weight", [&] {
    TORCH_CHECK_VALUE(inputs % kPair<scalar_t> == 0, "the inputs of packed weights must be even, got ", inputs);
    pack(weight.const_data_ptr<scalar_t>(), outputs, inputs, packed.mutable_data_ptr<scalar_t>());
  });
  return packed;
}

template <typename io>
Norm<io> make_norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  if (!weight) return {nullptr, nullptr, 0.0f};
  return {weight->const_data_ptr<io>(), bias->const_data_ptr<io>(), static_cast<float>(eps)};
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                     const std::optional<Tensor>& residual, int64_t outputs, double eps, bool relu) {
  TORCH_CHECK_VALUE(!(relu && residual), "give relu or a residual, not both");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor out = at::empty(sizes, x.options());
  TORCH_CHECK(can_pack(x.scalar_type()), "packed layers of ", x.scalar_type(), " cannot run here");
  DISPATCH(x.scalar_type(), "packed_linear", [&] {
    linear<scalar_t>({packed, outputs, bias}, make_norm<scalar_t>(norm_weight, norm_bias, eps),
                     x.const_data_ptr<scalar_t>(), relu, residual ? residual->const_data_ptr<scalar_t>() : nullptr,
                     x.numel() / packed.size(1), out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

Tensor packed_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& expand,
                  const Tensor& expand_bias, const Tensor& project, const Tensor& project_bias, double eps) {
  const int64_t dim = x.size(-1), hidden = project.size(1);
  Tensor out = at::empty(x.sizes(), x.options());
  TORCH_CHECK(can_pack(x.scalar_type()), "packed layers of ", x.scalar_type(), " cannot run here");
  DISPATCH(x.scalar_type(), "packed_mlp", [&] {
    mlp<scalar_t>(make_norm<scalar_t>(norm_weight, norm_bias, eps), {expand, hidden, expand_bias},
                  {project, dim, project_bias}, x.const_data_ptr<scalar_t>(), x.numel() / dim,
                  out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("can_pack(ScalarType dtype) -> bool", &can_pack);
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
      "int outputs, float eps, bool relu) -> Tensor");
  m.def(
      "packed_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor expand, Tensor expand_bias, Tensor project, "
      "Tensor project_bias, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(spatial_mamba_cpu, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_mlp", &packed_mlp);
}

}  // namespace spatial_mamba
