"""The operators of `torch.library`: schemas, shapes (fake forms), FLOPs and gradients, whichever back end runs them.

Packed linear layers have no gradients.

Activations are of one dtype (float32, bfloat16, float16 or float64); weights, states and gradients of weights are of
the compute dtype, float32 (float64 for float64 activations). Each module has the shapes of its operator; maps of tokens
are (batch, H, W, channels), ``dim`` weights are (dim,).

Activations are contiguous, except that the tokens of a depthwise convolution, a gate and the input of the mixer may be
some of the channels of a wider map. Back ends get them at strides (H W s, W s, s, 1), and write gradients at such ones.

Autocast leaves the operators alone: their accumulators are of the compute dtype whatever dtype comes in.
"""

from .depthwise_conv import CONV_FLOPS, depthwise_conv, depthwise_conv_backward
from .gated_norm import gated_norm, gated_norm_backward
from .packed_linear import packed_linear, packed_mlp
from .selective_scan import SCAN_FLOPS, selective_scan, selective_scan_backward
from .spatial_mixer import spatial_mixer, spatial_mixer_backward
from .state_fusion import state_fusion, state_fusion_backward
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

__all__ = [
    "CONV_FLOPS",
    "SCAN_FLOPS",
    "depthwise_conv",
    "depthwise_conv_backward",
    "gated_norm",
    "gated_norm_backward",
    "packed_linear",
    "packed_mlp",
    "selective_scan",
    "selective_scan_backward",
    "spatial_mixer",
    "spatial_mixer_backward",
    "state_fusion",
    "state_fusion_backward",
    "structure_aware_scan",
    "structure_aware_scan_backward",
]
