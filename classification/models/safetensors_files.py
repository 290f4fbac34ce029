"""Read and write safetensors files. Those that this project writes contain a checksum of their tensors."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .checkpoint_reader import DTYPES, MAX_DIMENSIONS, Converter, check_values
from .stand_ins import DamagedFileError, check_key

# Entries of the metadata: information about the weights, as JSON, and the CRC-32 of the tensors, in hexadecimal.
_ABOUT, _CHECKSUM = "spatial_mamba", "spatial_mamba.crc32"


def write_safetensors(state: Mapping[str, Tensor], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write tensors and information about them.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if ``about`` has values that JSON cannot represent.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}  # none share memory
    metadata = {"format": "pt", _CHECKSUM: _checksum(tensors)}
    if about is not None:
        metadata[_ABOUT] = json.dumps(about)
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors; for a file of this project, the tensors under "model" and the information about them.

    Raises:
        DamagedFileError, and any other exception: for damaged files.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, not a mapping
    for name in tensors:
        check_key(name)  # as in the files of torch.save
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(tensors):
        raise DamagedFileError("its checksum is wrong")
    about = Converter(path.stat().st_size).plain(json.loads(metadata.get(_ABOUT, "{}")))
    return {**about, "model": tensors} if about else tensors


def _own(tensor: Tensor) -> Tensor:
    """Copy a tensor out of the memory-mapped file, which another program may change or truncate."""
    if tensor.dtype not in DTYPES or tensor.dim() > MAX_DIMENSIONS:
        raise DamagedFileError(f"it has a tensor of {tensor.dtype} with {tensor.dim()} dimensions")
    check_values(tensor.reshape(-1).view(torch.uint8), tensor.dtype)
    return tensor.clone()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of names, types, shapes and bytes, in the order of the names."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
