"""Stand-ins for the types in checkpoints besides tensors and plain containers; they run no code of those types."""

from collections import OrderedDict
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch

_NUMBERS = {"?", "b1", *(kind + size for kind in "iuf" for size in "1248")} - {"f1"}  # NumPy's codes


class ForeignTypeError(Exception):
    """A file asks for a type that is not allowed; the message is its name."""


class DamagedFileError(Exception):
    """A file is damaged, forged or has another format; the message says why."""


class StandIn:
    """A value that a pickle cannot change once it is complete."""

    def __setstate__(self, state: Any) -> None:
        raise DamagedFileError("its pickle changes a value that has no state")


class Function(StandIn):
    """A function that a pickle may call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class Name(StandIn):
    """A type that a pickle may name but not call: of a storage, an array, default values."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> NoReturn:  # PyTorch's list of safe types takes callables
        raise ForeignTypeError(self.name)


class Discarded:
    """Takes the place of objects that are not needed, such as the options of timm's scripts."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


class History(StandIn):
    """A ``HistoryBuffer`` of mmengine: logged values, and how many steps each counts."""

    state: dict[str, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if self.state is not None or not isinstance(state, dict):
            raise DamagedFileError("its pickle fills a history twice")
        self.state = state

    @staticmethod
    def method(owner: object, name: str) -> None:
        """Histories refer to their methods through ``getattr``, which could reach anything; this reaches nothing."""
        if owner is not History or name not in ("min", "max", "current", "mean"):
            raise ForeignTypeError(f"getattr of {owner!r:.80}, {name!r:.40}")


class Dtype(StandIn):
    """A ``numpy.dtype`` of little-endian numbers; forged ones could make NumPy treat numbers as addresses."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _NUMBERS:
            raise ForeignTypeError(f"numpy.dtype of {code!r:.40}")
        self.numpy = np.dtype(code).newbyteorder("<")

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise ForeignTypeError(f"numpy.dtype of byte order {state[1]!r:.40}")


class Array(StandIn):
    """A ``numpy.ndarray`` of numbers; it owns its memory, and can be filled once."""

    numpy: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if self.numpy is not None or type(dtype) is not Dtype or type(content) is not bytes:
            raise ForeignTypeError("numpy.ndarray of anything but numbers")
        self.numpy = np.ndarray(shape, dtype.numpy, content, order="F" if is_fortran else "C").copy("K")

    @staticmethod
    def empty(kind: object, shape: object, code: object) -> "Array":
        """NumPy's function that makes the array to be filled."""
        if kind is not Array:
            raise ForeignTypeError("numpy.core.multiarray._reconstruct of another type")
        return Array()

    @staticmethod
    def scalar(dtype: object, content: bytes) -> np.generic:
        """NumPy's function that makes a single number."""
        if type(dtype) is not Dtype:
            raise ForeignTypeError("numpy.core.multiarray.scalar of another type")
        return np.frombuffer(content, dtype.numpy, count=1)[0]


def config_types() -> list[tuple[Any, str]]:
    """What reads the settings and notes in checkpoints, with the names of the types in pickles.

    - yacs configs and ``defaultdict`` become ordered dictionaries
    - paths of another operating system become pure paths
    - dates, times and simple namespaces stay as they are
    - options of timm's scripts are discarded
    """
    paths = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath, type(Path()).__name__: type(Path())}
    paths |= {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath)}
    return [
        (OrderedDict, "yacs.config.CfgNode"),
        (_ordered, "collections.defaultdict"),
        *((Name(f"builtins.{name}"), f"builtins.{name}") for name in ("dict", "float", "int", "list", "str", "tuple")),
        (SimpleNamespace, "types.SimpleNamespace"),
        (Discarded, "argparse.Namespace"),
        # Python 3.13 defines paths in another module.
        *((kind, f"{module}.{name}") for name, kind in paths.items() for module in ("pathlib", "pathlib._local")),
        *((kind, f"datetime.{kind.__name__}") for kind in (date, datetime, time, timedelta, timezone)),
    ]


def _ordered(factory: object = None) -> OrderedDict:
    """Replaces ``defaultdict``, without its default values."""
    return OrderedDict()


def known_types() -> dict[str, Any]:
    """What reads the types in checkpoints, by their names in pickles: a class to instantiate, or a ``Function``."""
    known: list[tuple[Any, str]] = [
        (OrderedDict, "collections.OrderedDict"),
        (dict, "collections.Counter"),
        (_latin1, "_codecs.encode"),
        (bytes, "builtins.bytearray"),
        (complex, "builtins.complex"),
        (set, "builtins.set"),
        (tuple, "torch.Size"),
        (lambda *parts: ":".join(map(str, parts)), "torch.device"),
        (History, "mmengine.logging.history_buffer.HistoryBuffer"),
        (History.method, "builtins.getattr"),
        (Dtype, "numpy.dtype"),
        (Array, "numpy.ndarray"),
        *config_types(),
    ]
    for core in ("core", "_core"):  # of NumPy 1 and 2
        known += [(Array.scalar, f"numpy.{core}.multiarray.scalar")]
        known += [(Array.empty, f"numpy.{core}.multiarray._reconstruct")]
    # A pickle could set attributes of other classes and of functions.
    bare = (OrderedDict, Discarded, History, Dtype, Array)
    return {name: kind if kind in bare or isinstance(kind, StandIn) else Function(kind) for kind, name in known}


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise ForeignTypeError(f"_codecs.encode to {encoding!r:.40}")
    return text.encode(encoding)


def allow_permanently(types: list[tuple[Any, str]]) -> None:
    """Let ``torch.load`` read these types for the rest of the process, except names that it already allows."""
    known = {
        kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
        for kind in torch.serialization.get_safe_globals()
    }
    torch.serialization.add_safe_globals([kind for kind in types if kind[1] not in known])
