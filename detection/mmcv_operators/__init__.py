"""Run mmcv without its compiled operators: torchvision and PyTorch serve those that detectors and segmentors need.

mmcv-lite is mmcv without the compiled module ``mmcv._ext``, and ``import mmdet`` fails without that module. This
package provides a substitute, `operators`, wherever Python finds no compiled one; a compiled one is always preferred.

It is a package of its own, installed as ``spatial_mamba_mmcv``: the entry point ``torch.backends`` calls `register`
whenever PyTorch is imported, so that OpenMMLab's own tools work too. It therefore imports nothing but Python's own
modules.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

MODULE = "mmcv._ext"
VERSION = "2.1.0"  # of mmcv, tested
# mmcv compiles for the PyTorch it sees, and pip hides PyTorch from builds unless told not to.
BUILD_COMMAND = (
    "pip uninstall -y mmcv-lite && pip install 'setuptools<82' wheel ninja psutil && "
    f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps mmcv=={VERSION}"
)


class MissingOperatorError(NotImplementedError):
    """A model needs an operator of mmcv that exists only compiled; the message names it and the command to build it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs mmcv's compiled operators: {BUILD_COMMAND}")


class _Finder(MetaPathFinder):
    """Comes last in ``sys.meta_path``, so it is only asked when there is no compiled module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, Path(__file__).with_name("operators.py")) if name == MODULE else None


def register() -> None:
    """Provide ``mmcv._ext`` in this process where it is not compiled; further calls change nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
