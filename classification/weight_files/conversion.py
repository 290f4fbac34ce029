"""Converts checkpoints between layouts: this trainer's, the published one, OpenMMLab's, and weights only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ...kernels.errors import UserError
from ..atomic_write import atomic_write, save
from ..config import to_plain
from ..models.architecture import PUBLISHED_FUSION, architecture_of
from ..models.safetensors_files import write_safetensors
from ..models.weights import (
    CLASSIFIER_ONLY,
    WeightsError,
    has_ema,
    has_entry,
    is_safetensors,
    model_weights,
    read_checkpoint,
)

LAYOUTS = ("classifier", "backbone", "openmmlab", "trainer", "published")
_ABOUT = ("classes", "config")  # needed to use a classifier
_TRAINING = ("optimizer", "lr_scheduler", "scaler", "epoch", "steps", "skipped_in_a_row", "max_accuracy")


def convert_file(source: Path, target: Path, layout: str, ema: bool = False, prefix: str = "") -> None:
    """Write the checkpoint ``source`` to ``target`` in another layout.

    Args:
        source: a checkpoint that ``read_checkpoint`` reads.
        target: ends in ``.safetensors`` for weights only, or in ``.pth``, ``.pt`` or ``.bin`` for PyTorch's format.
        layout: ``"classifier"``: the weights of the classifier; ``"backbone"``: those of the backbone;
            ``"openmmlab"``: the same, named as in a detector; ``"trainer"``, ``"published"``: a training checkpoint,
            with as much of the training state as the source has.
        ema: convert the EMA weights of the source.
        prefix: prefix of the names of the weights, if the source has several models.

    Raises:
        WeightsError: if the source cannot be used, or lacks the classifier or the EMA weights.
        UserError: if the target is the source, has an ending that does not suit the layout, or is not writable.
    """
    if target.suffix.lower() not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{target}: must end in .safetensors, .pth, .pt or .bin, which sets the format")
    if is_safetensors(target) and layout in ("trainer", "published"):
        raise UserError(f"{target}: safetensors holds weights only; a {layout} checkpoint must end in .pth")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the file to convert; name another output")
    content = converted(read_checkpoint(source), source, layout, ema, prefix)
    try:
        if is_safetensors(target):
            about = {key: content[key] for key in _ABOUT if key in content}
            weights = content["state_dict" if layout == "openmmlab" else "model"]
            with atomic_write(target) as unfinished:
                write_safetensors(weights, unfinished, about)
        else:
            save(content, target)
    except TypeError as error:
        raise UserError(f"{target}: the config of the source holds more than text and numbers; write a .pth") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{target}: cannot be written ({error})") from error


def converted(
    checkpoint: Mapping[str, Any], path: Path, layout: str, ema: bool = False, prefix: str = ""
) -> dict[str, Any]:
    """The content of a checkpoint in another layout, see ``convert_file``. ``path`` appears in messages.

    Raises:
        WeightsError: as ``convert_file``.
    """
    encoder = model_weights(checkpoint, path, ema, prefix)
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
        raise WeightsError(f"{path}: holds a backbone without a classifier; the {layout} layout needs one")
    if layout == "classifier":
        return {"model": encoder} | about
    if layout == "published" and architecture.fusion != PUBLISHED_FUSION:
        raise WeightsError(f"{path}: its fusion, {architecture.fusion}, does not exist in the published code")

    # Without loss scaling the state of the scaler is empty. A scaler in use would reject it, so it is left out.
    content: dict[str, Any] = {"model": encoder} | {
        key: checkpoint[key] for key in _TRAINING if has_entry(checkpoint, key)
    }
    if ema:
        # The optimiser's state belongs to the other weights.
        content = {key: value for key, value in content.items() if key not in ("optimizer", "lr_scheduler", "scaler")}
    elif has_ema(checkpoint):
        content["model_ema"] = model_weights(checkpoint, path, ema=True, prefix=prefix)
    record = checkpoint.get("max_accuracy_ema", checkpoint.get("max_accuray_ema"))
    if record is not None:
        content["max_accuray_ema" if layout == "published" else "max_accuracy_ema"] = record
    content |= about
    return _published(content, path) if layout == "published" else content


def _published(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content with its optimiser and config as the published code reads them.

    Raises:
        WeightsError: if they do not have such a form.
    """
    content = dict(content)
    try:
        if isinstance(optimizer := content.get("optimizer"), dict):
            # The group without weight decay is the last.
            groups = sorted(optimizer["param_groups"], key=lambda group: group["weight_decay"] == 0)
            content["optimizer"] = optimizer | {"param_groups": groups}
        if "config" in content:
            content["config"] = CfgNode(to_plain(content["config"]))
    except (LookupError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        reason = f"the published code could not read its optimiser or config ({error!s:.200})"
        raise WeightsError(f"{path}: {reason}") from error
    return content
