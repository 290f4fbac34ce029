"""Spatial-Mamba models; importing this room registers them with timm."""

from .spatial_mamba import (
    SpatialMamba,
    SpatialMambaBackbone,
    spatial_mamba_base,
    spatial_mamba_small,
    spatial_mamba_tiny,
)
from .weights import WeightsError

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "WeightsError",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]
