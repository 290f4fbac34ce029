"""Brings a checkpoint from one layout to another: this trainer's, the published one, OpenMMLab's, or bare weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from yacs.config import CfgNode

from ...kernels.errors import UserError
from ..atomic_write import atomic_write
from ..models.architecture import PUBLISHED_FUSION, architecture_of
from ..models.weights import (
    CLASSIFIER_ONLY,
    EMA_KEYS,
    METADATA_KEY,
    WeightsError,
    ema_state_dict_of,
    encoder_weights,
    is_safetensors,
    read_checkpoint,
    state_dict_of,
)

LAYOUTS = ("classifier", "backbone", "openmmlab", "trainer", "published")
_ABOUT = ("classes", "config")  # what a classifier is used with
_TRAINING = ("optimizer", "lr_scheduler", "scaler", "epoch", "steps", "skipped_in_a_row", "max_accuracy")


def convert_file(source: Path, target: Path, layout: str, ema: bool = False, prefix: str = "") -> None:
    """Write what ``source`` holds in another layout.

    Args:
        source: a checkpoint that ``read_checkpoint`` reads.
        target: ends in ``.safetensors``, for bare weights, or in ``.pth``, ``.pt`` or ``.bin`` for PyTorch's format.
        layout: ``"classifier"``: the weights of the classifier; ``"backbone"``: those that a backbone takes;
            ``"openmmlab"``: the same, named as in a detector; ``"trainer"``, ``"published"``: a training checkpoint,
            with the state of the training as far as the source has it.
        ema: take the EMA weights of the source.
        prefix: of the names of the weights to take, where the source has more than one model.

    Raises:
        WeightsError: if the source cannot be used, or has no classifier or EMA weights to give.
        UserError: for a target that is the source, whose ending does not go with the layout, or that is not writable.
    """
    if target.suffix.lower() not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{target}: must end in .safetensors, .pth, .pt or .bin, which tells the format")
    if is_safetensors(target) and layout in ("trainer", "published"):
        raise UserError(f"{target}: safetensors holds weights alone; a {layout} checkpoint must end in .pth")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the file to convert; name another one to write")
    content = converted(read_checkpoint(source), source, layout, ema, prefix)
    try:
        with atomic_write(target) as unfinished:
            if is_safetensors(target):
                state = {name: tensor.contiguous().clone() for name, tensor in content.pop(_entry(layout)).items()}
                metadata = {"format": "pt", METADATA_KEY: json.dumps({k: content[k] for k in _ABOUT if k in content})}
                safetensors.torch.save_file(state, unfinished, metadata)
            else:
                torch.save(content, unfinished)
    except TypeError as error:
        raise UserError(f"{target}: the file's config holds more than text and numbers; write to a .pth") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{target}: cannot be written ({error})") from error


def converted(
    checkpoint: Mapping[str, Any], path: Path, layout: str, ema: bool = False, prefix: str = ""
) -> dict[str, Any]:
    """The content of a checkpoint in another layout, see ``convert_file``; ``path`` is for messages.

    Raises:
        WeightsError: as ``convert_file``.
    """
    state = ema_state_dict_of(checkpoint, path) if ema else state_dict_of(checkpoint, path)
    encoder = encoder_weights(state, path, prefix)
    architecture = architecture_of(encoder)
    if architecture is None:
        raise WeightsError(f"{path}: holds no weights of Spatial-Mamba")
    about = {key: checkpoint[key] for key in _ABOUT if isinstance(checkpoint.get(key), list | dict)}
    if layout in ("backbone", "openmmlab"):
        weights = {name: tensor for name, tensor in encoder.items() if name not in CLASSIFIER_ONLY}
        if layout == "backbone":
            return {"model": weights}
        return {"meta": {}, "state_dict": {f"backbone.{name}": tensor for name, tensor in weights.items()}}
    if architecture.num_classes is None:
        raise WeightsError(f"{path}: holds a backbone without a classifier, of which no {layout} layout can be made")
    if layout == "classifier":
        return {"model": encoder} | about
    if layout == "published" and architecture.fusion != PUBLISHED_FUSION:
        raise WeightsError(f"{path}: fuses by {architecture.fusion}, for which the published code has no model")

    # Without loss scaling there is nothing in a scaler's state, which one at work would not take.
    content: dict[str, Any] = {"model": encoder} | {
        key: checkpoint[key] for key in _TRAINING if checkpoint.get(key) is not None and checkpoint[key] != {}
    }
    if layout == "published" and isinstance(content.get("optimizer"), dict):
        # There the group without weight decay comes last.
        groups = sorted(content["optimizer"]["param_groups"], key=lambda group: group["weight_decay"] == 0)
        content["optimizer"] = content["optimizer"] | {"param_groups": groups}
    if ema:
        # The state of the optimiser belongs to the weights that are left out.
        content = {key: value for key, value in content.items() if key not in ("optimizer", "lr_scheduler", "scaler")}
    elif any(checkpoint.get(key) for key in EMA_KEYS):
        content["model_ema"] = encoder_weights(ema_state_dict_of(checkpoint, path), path, prefix)
    record = checkpoint.get("max_accuracy_ema", checkpoint.get("max_accuray_ema"))
    if record is not None:
        content["max_accuray_ema" if layout == "published" else "max_accuracy_ema"] = record
    if layout == "published" and "config" in about:
        about["config"] = CfgNode(_plain(about["config"]))
    return content | about


def _entry(layout: str) -> str:
    """Where ``converted`` puts the weights."""
    return "state_dict" if layout == "openmmlab" else "model"


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
