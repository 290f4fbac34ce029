// LayerNorm.
#include "norm.cuh"

namespace spatial_mamba {

void layer_norm(const Norm& norm, Activations out, cudaStream_t stream) {
  with_type(norm.y, [&](auto* y) {
    launch_norm<false>("layer_norm", norm, y, y, static_cast<decltype(y)>(out.data), stream);
  });
}

void layer_norm_backward(const Norm& norm, const NormGradients& gradients, cudaStream_t stream) {
  with_type(norm.y,
            [&](auto* y) { launch_norm_backward<false>("layer_norm_backward", norm, y, y, gradients, stream); });
}

}  // namespace spatial_mamba
