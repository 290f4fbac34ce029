"""Backends that failed the self-test on a device: a record, so that they are no longer chosen there."""

import hashlib
from pathlib import Path

import torch

from . import build, native


def folder() -> Path:
    """The folder of the record: one file per failure, with the version of the backend that failed."""
    return build.library_folder() / "failed"


def name_of(backend: str, dtype: torch.dtype, device_type: str, capability: tuple[int, int] | None) -> str:
    """The file name of a failure; for a GPU of unknown compute capability, what such names start with."""
    place = device_type if capability is None else "{}-{}.{}".format(device_type, *capability)
    return f"{backend}-{str(dtype).removeprefix('torch.')}-{place}"


def record(name: str, backend: str, failed: bool) -> None:
    """Add a failure, or remove it if the backend did not fail again.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = folder() / name
    if failed:
        folder().mkdir(parents=True, exist_ok=True)
        file.write_text(_version_of(backend))
    elif name in recorded():
        file.unlink()


def recorded() -> tuple[str, ...]:
    """The names of the failures of the present libraries and versions."""
    return tuple(file.name for file in sorted(folder().glob("*-*-*")) if _counts(file))


def _counts(file: Path) -> bool:
    try:
        return file.read_text() == _version_of(file.name.partition("-")[0])
    except (OSError, ValueError):  # the package must not fail to import
        return False


def _version_of(backend: str) -> str:
    """What a failure depends on: versions, or the sources of the library and the processor."""
    if backend == "triton":
        return f"Triton {native.triton_version()}, PyTorch {torch.__version__}"
    processor = hashlib.sha256(" ".join(sorted(build.cpu_features())).encode()).hexdigest()
    return f"sources {native.loaded(backend).get('sources')}, processor {processor}"
