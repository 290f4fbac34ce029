"""The "triton" backend: the operators as Triton kernels, for GPUs and, in Triton's interpreter, for the CPU.

Arguments have the shapes and dtypes of the reference implementations. No kernel uses atomic additions, so results are
the same in every run.
"""

from .depthwise_conv import depthwise_conv, depthwise_conv_backward
from .gated_norm import gated_norm, gated_norm_backward
from .layer_norm import layer_norm, layer_norm_backward
from .selective_scan import selective_scan, selective_scan_backward
from .state_fusion import state_fusion, state_fusion_backward
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

__all__ = [
    "depthwise_conv",
    "depthwise_conv_backward",
    "gated_norm",
    "gated_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "selective_scan",
    "selective_scan_backward",
    "state_fusion",
    "state_fusion_backward",
    "structure_aware_scan",
    "structure_aware_scan_backward",
]
