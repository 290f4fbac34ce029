"""Run mmcv without its compiled operators: torchvision and PyTorch provide those that detectors and segmentors need.

mmcv-lite is mmcv without the compiled module ``mmcv._ext``, but ``import mmdet`` fails without that module. This
package provides a substitute, `operators`, if there is no compiled module.

It is installed as a separate package, ``spatial_mamba_mmcv``. The entry point ``torch.backends`` calls `register`
whenever PyTorch is imported, so OpenMMLab's own tools work too. It therefore imports only Python's standard library.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

MODULE = "mmcv._ext"
VERSION = "2.1.0"  # the tested version of mmcv
# mmcv compiles for the PyTorch it finds, which pip hides from builds by default.
BUILD_COMMAND = (
    "pip uninstall -y mmcv-lite && pip install 'setuptools<82' wheel ninja psutil && "
    f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps mmcv=={VERSION}"
)


class MissingOperatorError(NotImplementedError):
    """A model needs an operator that only a compiled mmcv provides; the message has the command to build it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs mmcv's compiled operators: {BUILD_COMMAND}")


class _Finder(MetaPathFinder):
    """Comes last in ``sys.meta_path``, so Python asks it only if there is no compiled module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, Path(__file__).with_name("operators.py")) if name == MODULE else None


def register() -> None:
    """Provide ``mmcv._ext`` in this process unless it is compiled; further calls change nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
