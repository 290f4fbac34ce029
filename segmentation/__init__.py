"""Spatial-Mamba in OpenMMLab's segmentors; importing this package registers the backbone ``MM_SpatialMamba``."""

from .. import detection  # noqa: F401, registers the backbone for both
