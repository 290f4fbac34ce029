// LayerNorm times the SiLU of a gate.
#include "norm.cuh"

namespace spatial_mamba {

int norm_partial_sums(const Norm& norm) { return norm_blocks(norm, kNormGradientBlocks); }

void gated_norm(const Norm& norm, Activations gate, Activations out, cudaStream_t stream) {
  with_types(gate, norm.y, [&](auto* typed_gate, auto* y) {
    launch_norm<true>("gated_norm", norm, typed_gate, y, static_cast<decltype(typed_gate)>(out.data), stream);
  });
}

void gated_norm_backward(const Norm& norm, Activations gate, const NormGradients& gradients, cudaStream_t stream) {
  with_types(gate, norm.y, [&](auto* typed_gate, auto* y) {
    launch_norm_backward<true>("gated_norm_backward", norm, typed_gate, y, gradients, stream);
  });
}

}  // namespace spatial_mamba
