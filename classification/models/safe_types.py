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


class ForgottenHistory:
    """In place of mmengine's histories of logged values, where nobody asks for them."""

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


def safe_types() -> list[Admitted]:
    """What the published classification checkpoints hold: configs of yacs, and NumPy's scalars and arrays."""
    # The reader fills no subclass of dict, so configs come back as plain ordered dictionaries; yacs is not needed.
    return [*safe_numpy_types(), (OrderedDict, "yacs.config.CfgNode")]


@contextmanager
def safe_types_admitted() -> Iterator[None]:
    """Let ``torch.load`` take safe types, and histories of mmengine, of which nothing is kept unless it is at work."""
    before = torch.serialization.get_safe_globals()
    admit_for_good([*safe_types(), *history_types(ForgottenHistory)])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def admit_for_good(types: list[Admitted]) -> None:
    """Let ``torch.load`` take types in this process, from now on, but for names that it takes already.

    Of two stand-ins under one name PyTorch would take any.
    """
    known = {
        kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
        for kind in torch.serialization.get_safe_globals()
    }
    torch.serialization.add_safe_globals([kind for kind in types if kind[1] not in known])
