"""Reads files of ``torch.save`` from any source, in time and memory bounded by their size.

PyTorch's reader checks no checksums, reserves any memory that a file asks for, and lets tensors of any layout through.
This one inspects a pickle before it unpickles, makes tensors only of data that are there, and returns plain values. It
changes no state of the process, so several threads can read at once.
"""

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, time, timedelta, timezone
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

MAX_VALUES = 1_000_000  # opcodes of a pickle, and values in it
MAX_DEPTH = 100  # nested containers
MAX_BITS = 1024  # of integers
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in files from before PyTorch 1.6
_STORAGES = {
    "BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Double": torch.float64, "Float": torch.float32,
    "Half": torch.float16, "Int": torch.int32, "Long": torch.int64, "Short": torch.int16, "Untyped": torch.uint8,
}  # fmt: skip
_INDEXED_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")  # the unpickler reserves memory up to their index
_REFUSED_OPCODES = ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
_PLAIN = (str, bytes, bool, float, complex, type(None), date, time, timedelta, timezone, np.generic, Discarded)


def read_torch_file(path: Path, history: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a file of ``torch.save``, in the present zip format or the one before PyTorch 1.6.

    Args:
        history: makes a ``HistoryBuffer`` of mmengine from its attributes; by default histories are discarded.

    Returns:
        Dictionaries, lists, tuples, sets, plain values, NumPy numbers and arrays, and dense CPU tensors. Tensors that
        shared memory still do.

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
        if not zipfile.is_zipfile(file):  # the list of its members comes last
            raise DamagedFileError("it is truncated")
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, size, history)


def _read_archive(archive: zipfile.ZipFile, size: int, history: Callable | None) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    is_stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
    total = sum(info.file_size for info in members.values())
    if not is_stored or len(members) < len(archive.infolist()) or total > size:
        raise DamagedFileError("its archive has compressed, repeated or overlapping members")
    names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1 or names[0].replace("data.pkl", "constants.pkl") in members:
        raise DamagedFileError("its archive is not one of torch.save")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
        raise DamagedFileError("its byte order is not that of this machine")

    unpickler = _Unpickler(archive.read(names[0]))
    value = unpickler.load()
    for key, storage in unpickler.storages.items():
        info = members[f"{folder}data/{key}"]
        if info.file_size != storage.nbytes:
            raise DamagedFileError("the data of a tensor have another size")
        with archive.open(info) as member:
            storage.read(member)
            member.read(1)  # at its end, the archive checks the CRC-32
    return _Converter(history).plain(value)


def _read_legacy(file: IO[bytes], size: int, history: Callable | None) -> Any:
    if _Unpickler(_next_pickle(file)).load() != _LEGACY_MAGIC:
        raise DamagedFileError("it is not a file of torch.save")
    for _ in ("version of the format", "sizes of integers"):
        _next_pickle(file)
    unpickler = _Unpickler(_next_pickle(file))
    value = unpickler.load()
    keys = _Unpickler(_next_pickle(file)).load()
    if sorted(keys) != sorted(unpickler.storages):
        raise DamagedFileError("its list of tensors is wrong")
    for key in keys:
        storage = unpickler.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count or file.tell() + storage.nbytes > size:
            raise DamagedFileError("the data of a tensor have another size")
        storage.read(file)
    return _Converter(history).plain(value)


def _next_pickle(file: IO[bytes]) -> bytes:
    start = file.tell()
    _inspect(file)
    length = file.tell() - start
    file.seek(start)
    return file.read(length)


def _inspect(content: bytes | IO[bytes]) -> None:
    """Refuse a pickle that takes much memory or time, or has opcodes that ``torch.save`` does not write."""
    written = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in _REFUSED_OPCODES:
            raise DamagedFileError(f"its pickle has the opcode {opcode.name}")
        if opcode.name in _INDEXED_OPCODES:
            written += 1
            if int(argument or 0) > 2 * written + 256:
                raise DamagedFileError("its pickle reserves memory that it does not use")
        if count > MAX_VALUES:
            raise DamagedFileError(f"its pickle has more than {MAX_VALUES:,} values")


@dataclass
class _Storage(StandIn):
    """The memory of tensors."""

    dtype: torch.dtype
    count: int
    content: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), compare=False)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self, file: IO[bytes]) -> None:
        """Fill the memory from a file that has at least ``nbytes`` bytes."""
        self.content = torch.empty(self.nbytes, dtype=torch.uint8)
        view, done = self.content.numpy().data, 0
        while done < self.nbytes:
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise DamagedFileError("it is truncated")
            done += count
        if self.dtype == torch.bool and self.nbytes and self.content.max() > 1:
            raise DamagedFileError("a boolean tensor has values besides 0 and 1")


@dataclass
class _View(StandIn):
    """A dense tensor in a storage, to be made when that has been read."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Make the tensor.

        Raises:
            DamagedFileError: if it leaves the storage, or two of its elements share memory.
        """
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise DamagedFileError("a tensor has an impossible shape")
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


class _Unpickler(pickle.Unpickler):
    """Unpickles bytes with stand-ins for all types, which a pickle can neither call nor change otherwise.

    Attributes:
        storages: those that the pickle refers to, by their keys.
    """

    def __init__(self, content: bytes) -> None:
        _inspect(content)
        super().__init__(io.BytesIO(content), encoding="utf-8")
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

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a type or function."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in self.known:
            return self.known[full]
        if full.startswith("torch._utils._rebuild_"):
            raise DamagedFileError(f"it has a tensor that is not dense ({name:.60})")
        is_storage = module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_storage or is_dtype or full in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return Name(name.removesuffix("Storage"))
        raise ForeignTypeError(full)

    def persistent_load(self, reference: Any) -> _Storage:
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
    return _View(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _view_of_dtype(
    storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any, dtype: Name, *more: Any
) -> _View:
    view = _view(storage, offset, size, stride, requires_grad, hooks, *more)
    view.dtype = getattr(torch, dtype.name)
    return view


def _view_of_type(function: Function, kind: Name, parts: tuple, state: Any) -> _View:
    if type(function) is not Function or type(kind) is not Name:
        raise DamagedFileError("a tensor has an unknown type")
    return function(*parts)


class _Converter:
    """Turns what an unpickler made into plain values, within ``MAX_VALUES`` and ``MAX_DEPTH``."""

    def __init__(self, history: Callable[[dict[str, Any]], Any] | None) -> None:
        self.history = history
        self.count = 0

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A new plain value.

        Raises:
            DamagedFileError: for any other type, or too many or too deeply nested values.
        """
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise DamagedFileError(f"it has more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels of them")
        kind = type(value)
        if kind in (dict, OrderedDict):
            made: Any = kind((self.plain(key, depth + 1), self.plain(value[key], depth + 1)) for key in value)
            if versions := vars(value).get("_metadata") if kind is OrderedDict else None:  # of modules
                made._metadata = self.plain(versions, depth + 1)
            return made
        if kind in (list, tuple, set):
            return kind(self.plain(entry, depth + 1) for entry in value)
        if kind is _View:
            return value.tensor()
        if kind is Array and value.numpy is not None:
            return value.numpy
        if kind is History:
            return self.history(self.plain(value.state, depth + 1)) if self.history else Discarded()
        if kind is SimpleNamespace:
            return SimpleNamespace(**self.plain(vars(value), depth + 1))
        if isinstance(value, PurePath):
            return kind(str(value))
        if (kind is int and value.bit_length() <= MAX_BITS) or isinstance(value, _PLAIN):
            return value
        raise DamagedFileError(f"it has a value of the type {kind.__name__}")
