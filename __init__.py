"""Spatial-Mamba: a vision backbone with one selective scan and structure-aware state fusion."""

import sys
from itertools import pairwise
from pathlib import PurePath

__version__ = "0.1.0"

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]


def _is_command() -> bool:
    """Whether this process is ``spatial-mamba`` or ``python -m spatial_mamba``.

    They list the commands without PyTorch, whose import takes seconds. Each command imports what it needs.
    """
    program = "".join(sys.argv[:1])  # "-m" while Python looks for the module to run
    if program == "-m":
        return ("-m", "spatial_mamba") in pairwise(sys.orig_argv)
    return PurePath(program).name in ("spatial-mamba", "spatial-mamba.exe")


if not _is_command():
    from .classification.models import (
        SpatialMamba,
        SpatialMambaBackbone,
        spatial_mamba_base,
        spatial_mamba_small,
        spatial_mamba_tiny,
    )
