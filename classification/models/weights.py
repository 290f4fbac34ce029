"""Reads checkpoint files safely and loads them strictly, with one clear error for everything that can be wrong."""

import json
import pickle
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .architecture import describe_other_architecture
from .safe_types import safe_types_admitted

METADATA_KEY = "spatial_mamba"  # of what a safetensors file of this project tells in JSON beside its weights
EMA_KEYS = ("model_ema", "state_dict_ema")  # the second is timm's
CLASSIFIER_ONLY = ("norm.weight", "norm.bias", "head.weight", "head.bias")  # what backbones leave out
# What the readers of PyTorch's two file formats raise on other files and on damaged ones.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)


class WeightsError(ValueError):
    """A checkpoint file is missing, unsafe, damaged, or does not fit the model."""


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint onto the CPU without executing anything it contains.

    A file that ends in ``.safetensors`` holds tensors alone. In PyTorch's own formats, beside tensors and plain
    containers, yacs configs, NumPy's numbers and arrays, mmengine's histories and the options of timm's scripts are
    admitted; of the last two nothing is kept, but for histories where mmengine is at work. A pickle that names any
    other type is refused.

    Raises:
        WeightsError: naming the file and what to do about it.
    """
    if "://" in str(path):
        raise WeightsError(f"{path}: is an address; download the file and give its path")
    path = Path(path).expanduser()
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty; download or save it again")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with safe_types_admitted():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or a truncated one; download or save it again") from error
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


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors, bare; or, in files of this project, as the entry "model" beside what is known of them."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return {**about, "model": tensors} if about else tensors


def state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str], key: str = "model") -> dict[str, Tensor]:
    """The state dict a checkpoint stores under ``key``, or the checkpoint itself if it is a bare state dict.

    Names lose the prefixes that DDP and ``torch.compile`` put before them.

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
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}


def ema_state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Tensor]:
    """The EMA weights of a checkpoint of this trainer, the published one or timm's.

    Raises:
        WeightsError: if it holds none.
    """
    for key in EMA_KEYS:
        if checkpoint.get(key):
            return state_dict_of(checkpoint, path, key)
    raise WeightsError(f"{path}: holds no EMA weights; take those of the model, without --ema")


def encoder_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a classifier or backbone by its own names: those of a detector or segmentor have a prefix."""
    prefix = "backbone."
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return inner or dict(state)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """``load_state_dict`` that checks every name and shape before it changes anything.

    Raises:
        WeightsError: naming the variants or the numbers of classes, where these differ, or else the first differences.
    """
    own = model.state_dict()
    problems = describe_differences(own, state)
    if problems:
        raise WeightsError(f"{path}: {describe_other_architecture(own, state) or problems}")
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


def load_backbone_weights(model: nn.Module, path: str | PathLike[str], prefix: str = "") -> None:
    """Start a backbone from the checkpoint of a classifier, or of a detector, segmentor or backbone.

    From the first it takes all but the final norm and the classifier, and its own ``outnorm`` layers keep their values.
    From the others it takes those of its output norms, too.

    Args:
        prefix: of the names of the backbone's weights in the file; ``backbone.`` is found without it.

    Raises:
        WeightsError: as ``read_checkpoint`` and ``load_strictly``, or if no name has the prefix.
    """
    state = state_dict_of(read_checkpoint(path), path)
    if prefix:
        prefix = f"{prefix.rstrip('.')}."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not state:
            raise WeightsError(f"{path}: holds no weights whose names start with {prefix}")
    state = encoder_weights(state)
    own_norms = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("outnorm")}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in CLASSIFIER_ONLY and (name in own_norms or not name.startswith("outnorm"))
    }
    load_strictly(model, own_norms | state, path)
