"""The backend "triton": the operators as Triton kernels, for GPUs, and for the CPU in Triton's interpreter.

The modules of the operators call these functions with shapes and dtypes as their reference implementations have them.
No kernel adds atomically, so that results are the same from run to run.
"""

from .depthwise_conv import depthwise_conv, depthwise_conv_backward
from .gated_norm import gated_norm, gated_norm_backward
from .selective_scan import selective_scan, selective_scan_backward
from .state_fusion import state_fusion, state_fusion_backward
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

__all__ = [
    "depthwise_conv",
    "depthwise_conv_backward",
    "gated_norm",
    "gated_norm_backward",
    "selective_scan",
    "selective_scan_backward",
    "state_fusion",
    "state_fusion_backward",
    "structure_aware_scan",
    "structure_aware_scan_backward",
]
