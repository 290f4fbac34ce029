// Downsampling between stages for inference: a linear layer, ReLU, depthwise 3x3 convolution of stride 2, ReLU, and
// another linear layer. Images are processed in bands of rows, so that the wide hidden map stays in the cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "downsampling_row.h"
#include "packed_layer.h"
#include "tokens.h"

namespace spatial_mamba {
namespace {

using at::Tensor;

constexpr int64_t kBandTokens = 256;

// x: tokens of `shape`; out: (batch, ceil(height / 2), ceil(width / 2), project.outputs).
template <typename io>
void downsample(const Shape& shape, const Layer<io>& expand, const Weights<float>& conv, const Layer<io>& project,
                const io* x, io* out) {
  const Shape hidden{1, shape.height, shape.width, expand.outputs}, outputs = halved(hidden);
  const int64_t band = std::clamp<int64_t>(kBandTokens / (2 * shape.width), 1, outputs.height);  // rows of outputs
  const int64_t parts = parts_per_image(shape.batch, outputs.height);
  const std::vector<io> zeros(hidden.dim, io(0));
  at::parallel_for(0, shape.batch * parts, 1, [&](int64_t begin, int64_t end) {
    const MatrixUnits units;
    // Two bands of rows: a row of outputs also reads the row before its band.
    const int64_t stride = hidden.width * hidden.dim, kept = 4 * band;
    const std::unique_ptr<io[]> memory(new io[kept * stride]), sampled(new io[band * outputs.width * hidden.dim]);
    const Rows<io> ring{memory.get(), stride, kept};
    auto sums = scratch_for(std::max(2 * band * shape.width, band * outputs.width));
    float* scratch = sums.values();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / parts, part = item % parts;
      const int64_t start = part * outputs.height / parts, stop = (part + 1) * outputs.height / parts;
      const auto row = [&](int64_t i) { return ring[i - 2 * start + kept]; };  // i >= 2 start - 1
      const auto read = [&](int64_t i, int64_t count) {
        apply(expand, x + shape.token(b, i) * expand.inputs, count * shape.width, scratch, row(i), Nothing());
      };
      if (start > 0) read(2 * start - 1, 1);
      for (int64_t first = start; first < stop; first += band) {
        const int64_t last = std::min(first + band, stop);
        read(2 * first, std::min(2 * last, shape.height) - 2 * first);
        for (int64_t i = first; i < last; ++i) {
          downsample_row(hidden, row, i, conv, zeros.data(), sampled.get() + (i - first) * outputs.width * hidden.dim);
        }
        apply(project, sampled.get(), (last - first) * outputs.width, scratch,
              out + (b * outputs.height + first) * outputs.width * project.outputs, Nothing());
      }
    }
  });
}

Tensor packed_downsampling(const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& conv_weight,
                           const Tensor& conv_bias, const Tensor& project, const Tensor& project_bias) {
  const Shape shape = shape_of(x);
  const int64_t hidden = expand_bias.size(0), dim = project_bias.size(0);
  TORCH_CHECK(can_pack(x.scalar_type()), "packed layers of ", x.scalar_type(), " cannot run here");
  const Shape outputs = halved(shape);
  Tensor out = at::empty({outputs.batch, outputs.height, outputs.width, dim}, x.options());
  DISPATCH_PACKED(x.scalar_type(), "packed_downsampling", [&] {
    const Weights<float> conv({1, 1, 1, hidden}, conv_weight.const_data_ptr<float>(),
                              conv_bias.const_data_ptr<float>());
    downsample<scalar_t>(shape, {expand, hidden, expand_bias}, conv, {project, dim, project_bias},
                         x.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spatial_mamba_cpu, m) {
  m.def("packed_downsampling", torch::dispatch(at::kCPU, &packed_downsampling));
}

}  // namespace spatial_mamba
