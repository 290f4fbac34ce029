"""Read ``torch.save`` files from any source, in time and memory bounded by their size.

PyTorch's reader does not verify checksums, allocates as much memory as a file asks for, and accepts tensors of any
layout. This one interprets pickles itself, creates tensors only from data in the file, and returns plain values. It
does not change the state of the process, so several threads can read at once.
"""

import io
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, time, timedelta, timezone
from functools import cached_property
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .stand_ins import (
    Array,
    DamagedFileError,
    Discarded,
    ForeignTypeError,
    Function,
    History,
    Name,
    StandIn,
    known_types,
)
from .unpickler import MAX_VALUES, Unpickler

MAX_DEPTH = 100  # nested containers
MAX_DIMENSIONS = 64  # of tensors, as in PyTorch's loops
_CHUNK = 2**18  # bytes to read at once; their checksum is computed in the processor's cache
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in files from before PyTorch 1.6
_STORAGES = {
    "BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Double": torch.float64, "Float": torch.float32,
    "Half": torch.float16, "Int": torch.int32, "Long": torch.int64, "Short": torch.int16, "Untyped": torch.uint8,
}  # fmt: skip
_NAMES_OF_PYTHON_2 = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}
# Dtypes that have no storage type.
_UNTYPED = {
    "complex32", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "uint16",
    "uint32", "uint64",
}  # fmt: skip
DTYPES = {*_STORAGES.values(), *(getattr(torch, name) for name in _UNTYPED if hasattr(torch, name))}
_PLAIN = (bool, int, float, complex, type(None), PurePath, date, time, timedelta, timezone, np.generic, Discarded)


def read_torch_file(path: Path, history: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a ``torch.save`` file, in the current zip format or the format before PyTorch 1.6.

    Args:
        history: makes a ``HistoryBuffer`` of mmengine from its attributes; by default histories are discarded.

    Returns:
        Dictionaries, lists, tuples, sets, plain values, NumPy numbers and arrays, types of tensors, and dense CPU
        tensors. Tensors that shared memory still do.

    Raises:
        ForeignTypeError: naming the type.
        DamagedFileError, and any other exception: for damaged files.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_zip:
            return _read_legacy(file, size, history)
        if not zipfile.is_zipfile(file):  # the list of members is at the end of a zip file
            raise DamagedFileError("it is truncated")
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, file, size, history)


def _read_archive(archive: zipfile.ZipFile, file: IO[bytes], size: int, history: Callable | None) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    is_stored = all(
        info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size for info in members.values()
    )
    total = sum(info.file_size for info in members.values())
    if not is_stored or len(members) < len(archive.infolist()) or total > size:
        raise DamagedFileError("its archive has compressed, repeated or overlapping members")
    names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1 or names[0].replace("data.pkl", "constants.pkl") in members:
        raise DamagedFileError("its archive was not written by torch.save")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
        raise DamagedFileError("its byte order differs from this machine's")

    tensors = _Tensors()
    length = members[names[0]].file_size
    value = Unpickler(io.BytesIO(archive.read(names[0])), length, tensors.find, tensors.storage).load()
    for key, storage in tensors.storages.items():
        info = members[f"{folder}data/{key}"]
        if info.file_size != storage.nbytes:
            raise DamagedFileError("the data of a tensor have another size")
        archive.open(info).close()  # checks the header before the data
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)  # the lengths of the name and of extra fields
        if storage.read(file) != info.CRC:
            raise DamagedFileError("the data of a tensor have another checksum")
    return Converter(length, history).plain(value)


def _read_legacy(file: IO[bytes], size: int, history: Callable | None) -> Any:
    tensors = _Tensors()
    unpickler = Unpickler(file, size, tensors.find, tensors.storage)
    if unpickler.load() != _LEGACY_MAGIC:
        raise DamagedFileError("it was not written by torch.save")
    for _ in ("version of the format", "sizes of integers"):
        unpickler.load()
    value, keys = unpickler.load(), unpickler.load()
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(tensors.storages):
        raise DamagedFileError("its list of tensors is wrong")
    for key in keys:
        storage = tensors.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count or file.tell() + storage.nbytes > size:
            raise DamagedFileError("the data of a tensor have another size")
        storage.read(file)
    return Converter(size, history).plain(value)


def check_values(content: Tensor, dtype: torch.dtype) -> None:
    """Check the bytes of tensors of a dtype, as uint8: PyTorch relies on booleans that are 0 or 1.

    Raises:
        DamagedFileError: for other booleans.
    """
    if dtype == torch.bool and content.numel() and content.max() > 1:
        raise DamagedFileError("a boolean tensor has values other than 0 and 1")


@dataclass
class _Storage(StandIn):
    """The memory of tensors."""

    dtype: torch.dtype
    count: int
    content: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), compare=False)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self, file: IO[bytes]) -> int:
        """Fill the memory from a file that has at least ``nbytes`` bytes, and return their CRC-32."""
        self.content = torch.empty(self.nbytes, dtype=torch.uint8)
        view, done, crc = self.content.numpy().data, 0, 0
        while done < self.nbytes:
            chunk = view[done : done + _CHUNK]
            count = file.readinto(chunk)  # type: ignore[attr-defined]
            if not count:
                raise DamagedFileError("it is truncated")
            crc = zlib.crc32(chunk[:count], crc)
            done += count
        check_values(self.content, self.dtype)
        return crc


@dataclass
class _View(StandIn):
    """A dense tensor in a storage, created after the storage has been read. All numbers are non-negative."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @cached_property
    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            DamagedFileError: if it extends beyond the storage, or two of its elements share memory.
        """
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.dtype)
        last = 0  # index of the last element within the dimensions of smaller strides
        for stride, length in sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n > 1):
            if stride <= last:
                raise DamagedFileError("a tensor is expanded: its elements share memory")
            last += stride * (length - 1)
        if (self.offset + last + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise DamagedFileError("a tensor is larger than its data")
        return self.storage.content.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class _Tensors:
    """Resolves the names and references in a pickle: tensors, and all other types.

    Attributes:
        storages: the storages that the pickle refers to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.known = {
            **known_types(),
            "torch._utils._rebuild_tensor": Function(_view),
            "torch._utils._rebuild_tensor_v2": Function(_view),
            "torch._utils._rebuild_tensor_v3": Function(_view_of_dtype),
            "torch._utils._rebuild_parameter": Function(lambda view, *others: view),
            "torch._utils._rebuild_parameter_with_state": Function(lambda view, *others: view),
            "torch._tensor._rebuild_from_type_v2": Function(_view_of_type),
        }

    def find(self, full: str) -> Function | Name:
        """The stand-in for a type or function."""
        full = _NAMES_OF_PYTHON_2.get(full, full.replace("__builtin__.", "builtins."))
        if full in self.known:
            return self.known[full]
        module, _, name = full.rpartition(".")
        if full.startswith("torch._utils._rebuild_"):
            raise DamagedFileError(f"it has a tensor that is not dense ({name:.60})")
        is_storage = module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_storage or is_dtype or full in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return Name(name.removesuffix("Storage"))
        raise ForeignTypeError(full)

    def storage(self, reference: Any) -> _Storage:
        """The storage that a tensor refers to."""
        word, kind, key, _, count, *view = reference
        if word != "storage" or type(key) is not str or type(count) is not int or count < 0 or any(view):
            raise DamagedFileError("a reference to tensor data is wrong")
        storage = _Storage(_STORAGES[kind.name], count)
        if self.storages.setdefault(key, storage) != storage:
            raise DamagedFileError("two references to the same tensor data differ")
        return self.storages[key]


def _view(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _View:
    if type(storage) is not _Storage or metadata:
        raise DamagedFileError("a tensor has unknown properties")
    numbers = (offset, *size[:MAX_DIMENSIONS], *stride[:MAX_DIMENSIONS])
    fits = len(size) == len(stride) <= MAX_DIMENSIONS
    if not fits or any(type(number) is not int or number < 0 for number in numbers):
        raise DamagedFileError("a tensor has an impossible shape")
    return _View(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _view_of_dtype(
    storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any, dtype: Name, *more: Any
) -> _View:
    view = _view(storage, offset, size, stride, requires_grad, hooks, *more)
    if dtype.name not in _UNTYPED:
        raise DamagedFileError(f"it has a tensor of the type {dtype.name}")
    view.dtype = getattr(torch, dtype.name)
    return view


def _view_of_type(function: Function, kind: Name, parts: tuple, state: Any) -> _View:
    if function not in (Function(_view), Function(_view_of_dtype)) or type(kind) is not Name:
        raise DamagedFileError("a tensor has an unknown type")
    return function(*parts)


class Converter:
    """Turns what an unpickler made into plain values, as many as a file of ``size`` bytes may have."""

    def __init__(self, size: int, history: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.history = history
        self.left = min(MAX_VALUES, size + 100_000)

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A new plain value. What containers share is copied, except tensors, arrays and text.

        Raises:
            DamagedFileError: for any other type, or too many or too deeply nested values.
        """
        kind = type(value)
        self.left -= 1 + (len(value) // 100 if kind in (str, bytes) else 0)
        if self.left < 0:
            raise DamagedFileError(f"it has more than {MAX_VALUES:,} values, or repeats them too often")
        if depth > MAX_DEPTH:
            raise DamagedFileError(f"its values have more than {MAX_DEPTH} levels")
        if kind in (dict, OrderedDict):
            made: Any = kind((self.plain(key, depth + 1), self.plain(entry, depth + 1)) for key, entry in value.items())
            if kind is OrderedDict and hasattr(value, "_metadata"):
                made._metadata = self._versions(value._metadata)
            return made
        if kind in (list, tuple, set):
            return kind(self.plain(entry, depth + 1) for entry in value)
        if kind is _View:
            return value.tensor
        if kind is Array and value.numpy is not None:
            return value.numpy
        if kind is History and value.state is not None:
            return self.history(self.plain(value.state, depth + 1)) if self.history else Discarded()
        if kind is SimpleNamespace:
            return SimpleNamespace(**self.plain(vars(value), depth + 1))
        if kind is Name and isinstance(dtype := vars(torch).get(value.name), torch.dtype):
            return dtype
        if kind in (str, bytes) or isinstance(value, _PLAIN):
            return value
        raise DamagedFileError(f"it has a value of type {kind.__name__}")

    def _versions(self, metadata: Any) -> OrderedDict[str, dict[str, int]]:
        """The module versions in a state dict. PyTorch would act on other entries, for example replace parameters."""
        if type(metadata) not in (dict, OrderedDict):
            raise DamagedFileError("the versions of its modules are wrong")
        versions = OrderedDict()
        for name, entry in self.plain(metadata).items():
            if type(name) is not str or not isinstance(entry, dict) or type(entry.get("version", 0)) is not int:
                raise DamagedFileError("the versions of its modules are wrong")
            versions[name] = {"version": entry["version"]} if "version" in entry else {}
        return versions
