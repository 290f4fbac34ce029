// LayerNorm.
#include "norm.cuh"

namespace spatial_mamba {

void layer_norm(const Norm& norm, Activations out, cudaStream_t stream) {
  launch_norm<false>("layer_norm", norm, norm.y, out, stream);
}

void layer_norm_backward(const Norm& norm, const NormGradients& gradients, cudaStream_t stream) {
  launch_norm_backward<false>("layer_norm_backward", norm, norm.y, gradients, stream);
}

}  // namespace spatial_mamba
