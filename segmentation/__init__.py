"""Spatial-Mamba in OpenMMLab's segmentors; importing this room registers the backbone ``MM_SpatialMamba``."""

from ..detection import openmmlab  # noqa: F401
