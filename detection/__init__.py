"""Spatial-Mamba in OpenMMLab's detectors; importing this room registers the backbone ``MM_SpatialMamba``."""

from . import openmmlab  # noqa: F401
