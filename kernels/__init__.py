"""The state-space operators of Spatial-Mamba and their backends, independent of any model."""

from . import packed_linear as _  # noqa: F401, registers its operators
from .backends import use_backend
from .depthwise_conv import depthwise_conv
from .downsampling import downsampling
from .gated_norm import gated_norm
from .layer_norm import layer_norm
from .mlp import mlp
from .selective_scan import selective_scan
from .spatial_mixer import spatial_mixer
from .state_fusion import state_fusion
from .structure_aware_scan import structure_aware_scan

__all__ = [
    "depthwise_conv",
    "downsampling",
    "gated_norm",
    "layer_norm",
    "mlp",
    "selective_scan",
    "spatial_mixer",
    "state_fusion",
    "structure_aware_scan",
    "use_backend",
]
