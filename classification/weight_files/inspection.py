"""Describes the content of a checkpoint file without executing any of it."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.command_line import printable
from ..models.architecture import Architecture, architecture_of
from ..models.weights import (
    ema_state_dict_of,
    encoder_weights,
    has_ema,
    has_entry,
    is_safetensors,
    read_checkpoint,
    state_dict_of,
)

_RECORDS = ("epoch", "steps", "max_accuracy", "max_accuracy_ema", "max_accuray_ema")  # the last as published


def inspect_file(path: Path, prefix: str = "") -> dict[str, Any]:
    """Describe a checkpoint in values that JSON can represent; entries that do not apply are left out.

    Raises:
        WeightsError: if the file is missing, unsafe or damaged, or holds no weights.
    """
    checkpoint = read_checkpoint(path)
    state = state_dict_of(checkpoint, path)
    encoder = encoder_weights(state, path, prefix)
    architecture = architecture_of(encoder)
    found: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "format": file_format(path),
        "layout": layout_of(checkpoint),
        "holds": _holds(architecture, others=len(encoder) < len(state)),
    }
    if architecture is not None:
        found |= {"variant": architecture.variant, "architecture": str(architecture), "options": architecture.options()}
    found["parameters"] = sum(tensor.numel() for name, tensor in state.items() if not _is_statistic(name))
    found["dtypes"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    if found["holds"] == "detector or segmentor":
        found["parts"] = _sizes_of_parts(state)
    if has_ema(checkpoint):
        found["ema"] = _compare(state, ema_state_dict_of(checkpoint, path))
    found |= {name: _number(checkpoint[name]) for name in _RECORDS if name in checkpoint}
    if isinstance(checkpoint.get("classes"), list):
        found["classes"] = list(map(str, checkpoint["classes"]))
    found["training state"] = [key for key in ("optimizer", "lr_scheduler", "scaler") if has_entry(checkpoint, key)]
    return {key: value for key, value in found.items() if value not in ([], {})}


def layout_of(checkpoint: Mapping[str, Any]) -> str:
    """``"trainer"``, ``"published"``, ``"openmmlab"``, or else ``"weights"``, at the top level or in one entry."""
    if "state_dict" in checkpoint and "meta" in checkpoint:
        return "openmmlab"
    if "model" in checkpoint and "max_accuray_ema" in checkpoint:
        return "published"
    if "model" in checkpoint and "max_accuracy" in checkpoint:
        return "trainer"
    return "weights"


def file_format(path: Path) -> str:
    """The file format, for messages."""
    if is_safetensors(path):
        return "safetensors"
    return "PyTorch (zip)" if zipfile.is_zipfile(path) else "PyTorch (before 1.6)"


def text_of(found: Mapping[str, Any]) -> str:
    """The result of ``inspect_file`` as text, one line per entry."""
    lines = []
    for key, value in found.items():
        if key == "options":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        elif isinstance(value, list):
            shown = ", ".join(value[:5])
            value = f"{shown}, ... ({len(value)})" if len(value) > 5 else shown
        elif isinstance(value, int) and key in ("bytes", "parameters"):
            value = f"{value:,}"
        lines.append(f"{key + ':':<18}{printable(str(value))}")
    return "\n".join(lines)


def _holds(architecture: Architecture | None, others: bool) -> str:
    """The kind of model; ``others`` says whether there are entries outside the architecture."""
    if architecture is None:
        return "weights of another model"
    if architecture.num_classes is not None:
        return "classifier"
    return "detector or segmentor" if others else "backbone"


def _is_statistic(name: str) -> bool:
    """Whether an entry of a state dict is a running statistic of BatchNorm rather than a parameter."""
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def _sizes_of_parts(state: Mapping[str, Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        if not _is_statistic(name):
            part = name.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + tensor.numel()
    return sizes


def _compare(state: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> str:
    if state.keys() != ema.keys() or any(state[name].shape != ema[name].shape for name in state):
        return "yes, with a different architecture from the model"
    changed = sum(not state[name].equal(ema[name]) for name in state)
    return f"yes, {changed} of {len(state)} entries differ from the model's"


def _number(value: Any) -> float | int | str:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float) else str(value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
