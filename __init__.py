"""Spatial-Mamba: a vision backbone with one selective scan and structure-aware state fusion."""

from pathlib import Path

from .classification.models import (
    SpatialMamba,
    SpatialMambaBackbone,
    spatial_mamba_base,
    spatial_mamba_small,
    spatial_mamba_tiny,
)

__version__ = "0.1.0"
__path__.append(str(Path(__file__).parent / "classification" / "commands"))  # python -m spatial_mamba[.NAME]

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]
