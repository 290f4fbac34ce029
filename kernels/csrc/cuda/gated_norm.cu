// LayerNorm times the SiLU of a gate.
#include "norm.cuh"

namespace spatial_mamba {

int norm_partial_sums(const Norm& norm) { return norm_blocks(norm, kNormGradientBlocks); }

void gated_norm(const Norm& norm, Activations gate, Activations out, cudaStream_t stream) {
  launch_norm<true>("gated_norm", norm, gate, out, stream);
}

void gated_norm_backward(const Norm& norm, Activations gate, const NormGradients& gradients, cudaStream_t stream) {
  launch_norm_backward<true>("gated_norm_backward", norm, gate, gradients, stream);
}

}  // namespace spatial_mamba
