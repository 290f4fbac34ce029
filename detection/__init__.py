"""Spatial-Mamba in OpenMMLab's detectors; importing this room registers the backbone ``MM_SpatialMamba``."""

from importlib.util import find_spec

if find_spec("mmengine"):  # without it there is no registry; the commands say what is missing
    from .openmmlab import registration  # noqa: F401
