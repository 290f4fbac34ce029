"""Spatial-Mamba in OpenMMLab's detectors; importing this package registers the backbone ``MM_SpatialMamba``."""

import warnings
from importlib.util import find_spec

if find_spec("mmengine"):  # without it there is no registry; the commands report what is missing
    try:
        from .openmmlab import registration  # noqa: F401
    except ImportError as error:  # for example OpenCV's; the commands report the fix
        warnings.warn(f"MM_SpatialMamba is not registered: {error}", stacklevel=2)
