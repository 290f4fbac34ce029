"""Types in published checkpoints that PyTorch does not allow by itself; a stand-in that runs no code reads each."""

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import torch

from .safe_numpy import safe_numpy_types

SafeType = tuple[Any, str]  # a stand-in and the name of the type it replaces

HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"


class Discarded:
    """Stands in for objects that are not needed, such as mmengine's histories of logged values."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def history_types(kind: type) -> list[SafeType]:
    """Stand-ins that read mmengine's histories as ``kind``.

    Histories refer to their methods through ``getattr``, which could reach anything; its stand-in reaches nothing.
    """

    def method(owner: object, name: str) -> None:
        if owner is not kind or name not in ("min", "max", "current", "mean"):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {owner!r}, {name!r}")

    return [(kind, HISTORY), (method, "builtins.getattr")]


def config_types() -> list[SafeType]:
    """Stand-ins that read the settings and notes in checkpoints.

    - yacs configs and ``defaultdict`` become ordered dictionaries, the only subclass of dict that the reader fills
    - paths of another operating system become pure paths
    - dates, times and simple namespaces stay as they are
    - options of timm's scripts are discarded
    """
    paths = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath, type(Path()).__name__: type(Path())}
    paths |= {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath)}
    return [
        (OrderedDict, "yacs.config.CfgNode"),
        (_ordered, "collections.defaultdict"),
        *((kind, f"builtins.{kind.__name__}") for kind in (dict, float, int, list, str, tuple)),  # default factories
        (SimpleNamespace, "types.SimpleNamespace"),
        (Discarded, "argparse.Namespace"),
        # Python 3.13 defines paths in another module.
        *((kind, f"{module}.{name}") for name, kind in paths.items() for module in ("pathlib", "pathlib._local")),
        *((kind, f"datetime.{kind.__name__}") for kind in (date, datetime, time, timedelta, timezone)),
    ]


def _ordered(factory: object = None) -> OrderedDict:
    """Stands in for ``defaultdict``, without its default values."""
    return OrderedDict()


def safe_types() -> list[SafeType]:
    """Stand-ins for the types in published classification checkpoints: configs, NumPy's scalars and arrays."""
    return [*safe_numpy_types(), *config_types()]


@contextmanager
def safe_types_allowed() -> Iterator[None]:
    """Let ``torch.load`` read safe types and mmengine's histories; the latter are discarded unless mmengine is in use.

    Types that the process already allows under the same names are set aside meanwhile, because PyTorch would choose
    between two entries of one name arbitrarily.
    """
    before = torch.serialization.get_safe_globals()
    mmengine_is_in_use = any(isinstance(kind, tuple) and kind[1] == HISTORY for kind in before)
    own = [*safe_types(), *([] if mmengine_is_in_use else history_types(Discarded))]
    names = {name for _, name in own}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(kind for kind in before if _name(kind) not in names), *own])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def allow_permanently(types: list[SafeType]) -> None:
    """Let ``torch.load`` read these types for the rest of the process, except names that it already allows."""
    known = set(map(_name, torch.serialization.get_safe_globals()))
    torch.serialization.add_safe_globals([kind for kind in types if kind[1] not in known])


def _name(kind: Any) -> str:
    """The name in pickles of an entry of PyTorch's list."""
    return kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
