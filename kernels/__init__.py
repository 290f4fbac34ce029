"""The state-space operators of Spatial-Mamba; this room knows nothing about models."""

from .selective_scan import selective_scan
from .state_fusion import state_fusion

__all__ = ["selective_scan", "state_fusion"]
