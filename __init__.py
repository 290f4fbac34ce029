"""Spatial-Mamba: a vision backbone with one selective scan and structure-aware state fusion."""

from .classification.models import (
    SpatialMamba,
    SpatialMambaBackbone,
    spatial_mamba_base,
    spatial_mamba_small,
    spatial_mamba_tiny,
)

__version__ = "0.1.0"

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]
