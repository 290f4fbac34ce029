"""Types beyond PyTorch's own that published checkpoints hold, each read by a stand-in that executes no code."""

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
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
    """What reads the configs in checkpoints: yacs's, and the options of timm's scripts, of which nothing is kept."""
    # The reader fills no subclass of dict, so configs come back as plain ordered dictionaries; yacs is not needed.
    return [(OrderedDict, "yacs.config.CfgNode"), (Forgotten, "argparse.Namespace")]


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
