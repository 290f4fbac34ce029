"""The state-space operators of Spatial-Mamba and their back ends; this room knows nothing about models."""

from . import operators  # noqa: F401, registers them with torch.library
from .backends import use_backend
from .selective_scan import selective_scan
from .state_fusion import state_fusion
from .structure_aware_scan import structure_aware_scan

__all__ = ["selective_scan", "state_fusion", "structure_aware_scan", "use_backend"]
