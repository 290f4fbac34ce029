"""Stand-ins for types in checkpoints other than tensors and plain containers. They run no code of those types."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch

_NUMBERS = {"?", "b1", *(kind + size for kind in "iuf" for size in "1248")} - {"f1"}  # NumPy's codes
_MAX_KEY = 1000  # characters
_PATHS = {
    "PurePosixPath": PurePosixPath, "PosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath,
    "WindowsPath": PureWindowsPath, type(Path()).__name__: type(Path()),
}  # fmt: skip


class ForeignTypeError(Exception):
    """A file asks for a type that is not allowed; the message is its name."""


class DamagedFileError(Exception):
    """A file is damaged, forged or in a different format; the message says why."""


class StandIn:
    """A value that a pickle cannot change, unless its type accepts a state in ``build``."""

    def build(self, state: Any) -> None:
        """Take the state."""
        raise DamagedFileError("its pickle changes a value that has no state")


@dataclass(frozen=True)
class Function(StandIn):
    """A function that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


@dataclass(frozen=True)
class Name(StandIn):
    """A type that a pickle may name but not call, such as the type of a storage, a number or default values."""

    name: str

    def __call__(self, *args: Any) -> NoReturn:  # PyTorch's list of safe types takes callables
        raise ForeignTypeError(self.name)


class Discarded(StandIn):
    """Replaces objects that are not needed, such as the options of timm's scripts."""

    def build(self, state: Any) -> None:
        """Keep nothing."""

    __setstate__ = build  # the name that torch.load calls


class History(StandIn):
    """A ``HistoryBuffer`` of mmengine: logged values, and how many steps each counts."""

    METHODS = ("min", "max", "current", "mean")

    state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        """Take the attributes of the history, without its table of methods."""
        if self.state is not None or type(state) is not dict:
            raise DamagedFileError("its pickle fills a history twice")
        self.state = {name: state[name] for name in ("_log_history", "_count_history", "max_length")}

    @staticmethod
    def method(owner: object, name: object) -> None:
        """Histories refer to their methods through ``getattr``, which could reach anything; this reaches nothing."""
        if owner != Function(History) or name not in History.METHODS:
            raise ForeignTypeError("builtins.getattr")


class Dtype(StandIn):
    """A ``numpy.dtype`` of little-endian numbers; forged ones could make NumPy treat numbers as addresses."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if type(code) is not str or code not in _NUMBERS:
            raise ForeignTypeError(f"numpy.dtype of {code:.40}" if type(code) is str else "numpy.dtype of a value")
        self.numpy = np.dtype(code).newbyteorder("<")  # type: ignore[call-overload]

    def build(self, state: Any) -> None:
        """Check the byte order; the rest describes the fields of records."""
        if state[1] not in ("<", "|"):
            raise ForeignTypeError("numpy.dtype of big-endian numbers")

    def array(self, shape: Any, content: object, order: Any = "C") -> np.ndarray:
        """An array that owns its memory.

        Raises:
            DamagedFileError: if the content does not fit such an array.
        """
        if type(content) is not bytes:
            raise ForeignTypeError("numpy.ndarray of anything but numbers")
        array: np.ndarray = np.ndarray(shape, self.numpy, content, order=order).copy("K")
        if self.numpy == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            raise DamagedFileError("a boolean array has values other than 0 and 1")
        return array


class Array(StandIn):
    """A ``numpy.ndarray`` of numbers; it can be filled once."""

    numpy: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Fill the array."""
        _, shape, dtype, is_fortran, content = state
        if self.numpy is not None or type(dtype) is not Dtype:
            raise ForeignTypeError("numpy.ndarray of anything but numbers")
        self.numpy = dtype.array(shape, content, "F" if is_fortran else "C")

    @staticmethod
    def empty(kind: object, shape: object, code: object) -> "Array":
        """Stands in for NumPy's function that creates the array to fill."""
        if kind != Function(Array):
            raise ForeignTypeError("numpy.core.multiarray._reconstruct of another type")
        return Array()

    @staticmethod
    def scalar(dtype: object, content: object) -> np.generic:
        """Stands in for NumPy's function that creates a single number."""
        if type(dtype) is not Dtype:
            raise ForeignTypeError("numpy.core.multiarray.scalar of another type")
        return dtype.array((1,), content)[0]


def check_key(key: object) -> None:
    """Refuse keys of dictionaries and sets whose hashes a file could make equal, which would take quadratic time.

    Hashes of strings depend on a secret, and small numbers have different hashes. Long strings take time to compare.

    Raises:
        DamagedFileError: for any other key.
    """

    def is_text(value: object) -> bool:
        return isinstance(value, str | bytes) and len(value) <= _MAX_KEY

    is_plain = key is None or type(key) in (bool, float) or isinstance(key, np.generic)
    is_small = type(key) is int and abs(key) < 2**60
    is_strings = type(key) is tuple and len(key) <= 16 and all(map(is_text, key))
    if not (is_text(key) or is_plain or is_small or is_strings):
        raise DamagedFileError(f"a dictionary has an unusual key ({type(key).__name__})")


def config_types() -> list[tuple[Any, str]]:
    """Stand-ins for the settings and notes in checkpoints, with the names of the types in pickles.

    - yacs configs and ``defaultdict`` become ordered dictionaries
    - paths of another operating system become pure paths
    - dates, times and simple namespaces stay as they are
    - options of timm's scripts are discarded
    """
    return [
        (OrderedDict, "yacs.config.CfgNode"),
        (_ordered, "collections.defaultdict"),
        *((Name(f"builtins.{name}"), f"builtins.{name}") for name in ("dict", "float", "int", "list", "str", "tuple")),
        (SimpleNamespace, "types.SimpleNamespace"),
        (Discarded, "argparse.Namespace"),
        # Python 3.13 defines paths in another module.
        *((kind, f"{module}.{name}") for name, kind in _PATHS.items() for module in ("pathlib", "pathlib._local")),
        *((kind, f"datetime.{kind.__name__}") for kind in (date, datetime, time, timedelta, timezone)),
    ]


def _ordered(factory: object = None) -> OrderedDict:
    """Replaces ``defaultdict``, without its default values, and yacs configs."""
    return OrderedDict()


def known_types() -> dict[str, Function | Name]:
    """Stand-ins for the types in checkpoints, by their names in pickles."""
    known: list[tuple[Any, str]] = [
        (_ordered_pairs, "collections.OrderedDict"),
        (_counts, "collections.Counter"),
        (_bytes, "_codecs.encode"),
        (_bytes, "builtins.bytes"),
        (_bytes, "builtins.bytearray"),
        (complex, "builtins.complex"),
        (_set, "builtins.set"),
        (tuple, "torch.Size"),
        (_device, "torch.device"),
        (History, "mmengine.logging.history_buffer.HistoryBuffer"),
        (History.method, "builtins.getattr"),
        *((Name(name), f"mmengine.logging.history_buffer.HistoryBuffer.{name}") for name in History.METHODS),
        (Dtype, "numpy.dtype"),
        (Array, "numpy.ndarray"),
        *config_types(),
        (_ordered, "yacs.config.CfgNode"),
        (_namespace, "types.SimpleNamespace"),
    ]
    known = [(_path_of(kind) if kind in _PATHS.values() else kind, name) for kind, name in known]
    for core in ("core", "_core"):  # of NumPy 1 and 2
        known += [(Array.scalar, f"numpy.{core}.multiarray.scalar")]
        known += [(Array.empty, f"numpy.{core}.multiarray._reconstruct")]
    return {name: kind if isinstance(kind, Name) else Function(kind) for kind, name in known}


def _ordered_pairs(pairs: Any = ()) -> OrderedDict:
    """An ``OrderedDict``; Python 2 wrote its entries as pairs."""
    for key, _ in pairs:
        check_key(key)
    return OrderedDict(pairs)


def _counts(counts: Any = ()) -> dict[Any, Any]:
    """Replaces ``Counter``."""
    if counts != () and type(counts) is not dict:
        raise DamagedFileError("a counter has no counts")
    return dict(counts)


def _set(values: Any = ()) -> set[Any]:
    for value in values:
        check_key(value)
    return set(values)


def _bytes(content: Any = b"", encoding: Any = "latin1") -> bytes:
    """Bytes, which pickles of protocol 2 write as text, and ``bytearray`` in all protocols."""
    if type(content) not in (str, bytes) or encoding not in ("latin1", "latin-1"):
        raise ForeignTypeError("_codecs.encode to an encoding other than latin1")
    return content.encode("latin1") if type(content) is str else content


def _namespace() -> SimpleNamespace:
    return SimpleNamespace()


def _path_of(kind: type[PurePath]) -> Callable[..., PurePath]:
    def path(*parts: Any) -> PurePath:
        if not all(type(part) is str for part in parts):
            raise DamagedFileError("a path has parts that are not text")
        return kind(*parts)

    return path


def _device(*parts: Any) -> str:
    if not all(type(part) in (str, int) for part in parts):
        raise DamagedFileError("a device has no name")
    return ":".join(map(str, parts))


def allow_permanently(types: list[tuple[Any, str]]) -> None:
    """Let ``torch.load`` read these types for the rest of the process, except names that it already allows."""
    known = {
        kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
        for kind in torch.serialization.get_safe_globals()
    }
    torch.serialization.add_safe_globals([kind for kind in types if kind[1] not in known])
