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
#include "moments.h"
#include "packed_layer.h"
#include "vec.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kTileTokens = 200;  // their hidden activations fit into the cache, except in the widest layers

// --- tiles ------------------------------------------------------------------------------------------------------------

struct Tiling {
  explicit Tiling(int64_t tokens) : tokens(tokens) {
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = std::max<int64_t>(at::divup(tokens, kTileTokens), 1);
    tiles = at::divup(wanted, threads) * threads;  // the same work for every thread
    size = std::max<int64_t>(at::divup(tokens, tiles), 1);
    size = at::divup(size, kProductRows) * kProductRows;
    tiles = at::divup(tokens, size);
  }
  // Calls visit(first token, number of tokens) for every tile of a thread's range, between set-up and release.
  template <typename Make>
  void run(Make&& make) const {
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      const MatrixUnits units;
      auto visit = make();
      for (int64_t tile = begin; tile < end; ++tile) visit(tile * size, std::min(size, tokens - tile * size));
    });
  }

  int64_t tokens, tiles, size;
};

template <typename io>
struct Norm {
  const io *weight, *bias;  // null: no normalisation
  float eps;
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

template <typename io>
void linear(const Layer<io>& layer, const Norm<io>& norm, const io* x, bool relu, const io* residual, int64_t tokens,
            io* out) {
  const Tiling tiling(tokens);
  tiling.run([&] {
    return [&, normal = std::unique_ptr<io[]>(norm.weight ? new io[tiling.size * layer.inputs] : nullptr),
            sums = scratch_for(tiling.size)](int64_t token, int64_t count) mutable {
      const io* from = x + token * layer.inputs;
      if (norm.weight) normalise(norm, from, count, layer.inputs, normal.get());
      const auto apply_to_tile = [&](const auto& finish) {
        apply(layer, norm.weight ? normal.get() : from, count, sums.values(),
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
            sums = scratch_for(tiling.size)](int64_t token, int64_t count) mutable {
      float* scratch = sums.values();
      normalise(norm, x + token * dim, count, dim, normal.get());
      apply(expand, normal.get(), count, scratch, hidden.get(), [](auto n, auto& y, int64_t, int) { gelu<float, n>(y); });
      apply(project, hidden.get(), count, scratch, out + token * dim, adding(x + token * dim));
    };
  });
}

// --- tensors ----------------------------------------------------------------------------------------------------------

Tensor pack_weight(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor packed = at::zeros({at::divup(outputs, kColumns), inputs, kColumns}, weight.options());
  DISPATCH_PACKED(weight.scalar_type(), "pack_weight", [&] {
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
  DISPATCH_PACKED(x.scalar_type(), "packed_linear", [&] {
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
  DISPATCH_PACKED(x.scalar_type(), "packed_mlp", [&] {
    mlp<scalar_t>(make_norm<scalar_t>(norm_weight, norm_bias, eps), {expand, hidden, expand_bias},
                  {project, dim, project_bias}, x.const_data_ptr<scalar_t>(), x.numel() / dim,
                  out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("can_pack(ScalarType dtype) -> bool", &can_pack);
  m.def("pack_weight", torch::dispatch(at::kCPU, &pack_weight));
  m.def("packed_linear", torch::dispatch(at::kCPU, &packed_linear));
  m.def("packed_mlp", torch::dispatch(at::kCPU, &packed_mlp));
}

}  // namespace spatial_mamba
