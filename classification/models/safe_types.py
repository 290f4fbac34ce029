"""Types beyond PyTorch's own that published checkpoints hold, each read by a stand-in that executes no code."""

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

Admitted = tuple[Any, str]  # a stand-in, and the name of what it stands for

HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"


class Forgotten:
    """In place of objects that nobody asks for, such as mmengine's histories of logged values."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def history_types(kind: type) -> list[Admitted]:
    """What reads mmengine's histories as ``kind``.

    They name their methods by ``getattr``, which could reach anything: in its place comes a function that reaches
    nothing.
    """

    def method(owner: object, name: str) -> None:
        if owner is not kind or name not in ("min", "max", "current", "mean"):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {owner!r}, {name!r}")

    return [(kind, HISTORY), (method, "builtins.getattr")]


def config_types() -> list[Admitted]:
    """What reads the settings and notes in checkpoints.

    That is yacs configs and ``defaultdict``, which come back as plain ordered dictionaries, since the reader fills no
    other subclass of dict; paths, in their pure form where they are another system's; dates and times; simple
    namespaces; and the options of timm's scripts, of which nothing is kept.
    """
    paths = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath, type(Path()).__name__: type(Path())}
    paths |= {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath)}
    return [
        (OrderedDict, "yacs.config.CfgNode"),
        (_ordered, "collections.defaultdict"),
        *((kind, f"builtins.{kind.__name__}") for kind in (dict, float, int, list, str, tuple)),  # makers of its values
        (SimpleNamespace, "types.SimpleNamespace"),
        (Forgotten, "argparse.Namespace"),
        # Python 3.13 has its paths in another module.
        *((kind, f"{module}.{name}") for name, kind in paths.items() for module in ("pathlib", "pathlib._local")),
        *((kind, f"datetime.{kind.__name__}") for kind in (date, datetime, time, timedelta, timezone)),
    ]


def _ordered(factory: object = None) -> OrderedDict:
    """In place of ``defaultdict``, without the values that it would make."""
    return OrderedDict()


def safe_types() -> list[Admitted]:
    """What the published classification checkpoints hold: configs, and NumPy's scalars and arrays."""
    return [*safe_numpy_types(), *config_types()]


@contextmanager
def safe_types_admitted() -> Iterator[None]:
    """Let ``torch.load`` take safe types, and histories of mmengine, of which nothing is kept unless it is at work.

    What the process admits under the same names is set aside meanwhile: of two stand-ins PyTorch would take any.
    """
    before = torch.serialization.get_safe_globals()
    mmengine_is_at_work = any(isinstance(kind, tuple) and kind[1] == HISTORY for kind in before)
    own = [*safe_types(), *([] if mmengine_is_at_work else history_types(Forgotten))]
    names = {name for _, name in own}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(kind for kind in before if _name(kind) not in names), *own])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def admit_for_good(types: list[Admitted]) -> None:
    """Let ``torch.load`` take types in this process, from now on, but for names that it takes already."""
    known = set(map(_name, torch.serialization.get_safe_globals()))
    torch.serialization.add_safe_globals([kind for kind in types if kind[1] not in known])


def _name(kind: Any) -> str:
    """By which pickles know an entry of PyTorch's list."""
    return kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
