"""Run timm's own model tests on the models of this project: ``python tests/timm_suite.py`` (``make test-timm``).

The tests are part of timm's source distribution. pip downloads it, for the installed version, to a temporary folder.
The tests of TorchScript are left out: PyTorch has deprecated it, and it does not support operators written in Python.
"""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import timm.models

import spatial_mamba  # noqa: F401, registers the models

CHOSEN = "spatial_mamba and not torchscript"


def download(folder: Path) -> Path:
    """Download timm's sources to ``folder``, and return the file of its model tests."""
    name = f"timm-{timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm"]
    subprocess.run([*command, f"--dest={folder}", name.replace("-", "==")], check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name / "tests" / "test_models.py"


def with_our_module(list_models: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``timm.list_models`` that adds our module to lists of modules: those of models with ``forward_intermediates``."""

    def listing(*args: object, **options: object) -> list[str]:
        if isinstance(options.get("module"), list):
            options["module"] = [*options["module"], "spatial_mamba"]
        return list_models(*args, **options)

    return listing


def main() -> int:
    timm.list_models = with_our_module(timm.list_models)
    with tempfile.TemporaryDirectory() as folder:
        tests = download(Path(folder))
        own_configuration = ["-c", "/dev/null", f"--rootdir={tests.parent}", "-p", "no:cacheprovider"]
        no_warnings = ["-W", "ignore"]  # about marks that only timm's configuration registers
        return pytest.main([str(tests), "-k", CHOSEN, "-q", "-rs", *own_configuration, *no_warnings])


if __name__ == "__main__":
    sys.exit(main())
