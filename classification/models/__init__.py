"""Spatial-Mamba models. Importing this package registers them with timm."""

from .spatial_mamba import (
    SpatialMamba,
    SpatialMambaBackbone,
    spatial_mamba_base,
    spatial_mamba_small,
    spatial_mamba_tiny,
)
from .trained import TrainedClassifier, load_classifier
from .weights import WeightsError

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "TrainedClassifier",
    "WeightsError",
    "load_classifier",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]
