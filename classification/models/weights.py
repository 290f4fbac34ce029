"""Reads checkpoint files safely and loads them strictly, with one clear error for everything that can be wrong."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .safe_numpy import safe_numpy_types

# What the readers of PyTorch's two file formats raise on other files and on damaged ones.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)


class WeightsError(ValueError):
    """A checkpoint file is missing, unsafe, damaged, or does not fit the model."""


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint onto the CPU without executing anything it contains.

    Beside tensors and plain containers only yacs configs and NumPy scalars are admitted, which the published
    checkpoints hold; a pickle that names any other type is refused.

    Raises:
        WeightsError: naming the file and what to do about it.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty; download or save it again")
    try:
        # The context takes away on leaving what it was given, even what this process admits for good.
        admitted = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in safe_types() if kind not in admitted]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        foreign = re.search(r"(?:Unsupported global:|unsupported) GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise WeightsError(
                f"{path}: refused, because it asks to load {foreign[1]}, which could run code; "
                "save it again with tensors and plain Python values only"
            ) from error
        raise WeightsError(
            f"{path}: not a PyTorch checkpoint, or a truncated one; download or save it again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint dictionary")
    return checkpoint


def state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str], key: str = "model") -> dict[str, Tensor]:
    """The state dict a checkpoint stores under ``key``, or the checkpoint itself if it is a bare state dict.

    Raises:
        WeightsError: if there are no weights to be found.
    """
    if key in checkpoint:
        state = checkpoint[key]
    elif key == "model" and "state_dict" in checkpoint:
        state = checkpoint["state_dict"]
    else:
        state = checkpoint
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f'{path}: found no model weights; expected them under "{key}" or at the top level')
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """``load_state_dict`` that checks every name and shape before it changes anything.

    Raises:
        WeightsError: naming the first differences.
    """
    problems = describe_differences(model.state_dict(), state)
    if problems:
        raise WeightsError(f"{path}: {problems}")
    model.load_state_dict(state, strict=True)


def describe_differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first differences in names and shapes between a model's state dict and that of a file; None without any."""
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is not part of the model" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if not problems:
        return None
    shown = "; ".join(sorted(problems)[:3]) + ("; ..." if len(problems) > 3 else "")
    return f"does not fit this model in {len(problems)} entries: {shown}"


def load_backbone_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Start a backbone from a classification checkpoint; its own ``outnorm`` layers keep their values.

    Raises:
        WeightsError: as ``read_checkpoint`` and ``load_strictly``.
    """
    state = state_dict_of(read_checkpoint(path), path)
    classifier_only = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    state = {name: tensor for name, tensor in state.items() if name not in classifier_only}
    output_norms = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("outnorm")}
    load_strictly(model, {**output_norms, **state}, path)


def safe_types() -> list[Any]:
    """Types beyond PyTorch's own that published checkpoints hold and that execute no code; for ``safe_globals``."""
    # The reader fills no subclass of dict, so configs come back as plain ordered dictionaries; yacs is not needed.
    return [*safe_numpy_types(arrays=False), (OrderedDict, "yacs.config.CfgNode")]
