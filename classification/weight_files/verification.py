"""Checks that a file has a complete model with finite outputs, and computes the digest of its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import use_backend
from ..models.architecture import Architecture, architecture_of
from ..models.trained import model_of
from ..models.weights import WeightsError, model_weights, read_checkpoint

IMAGE_SIZE = 224


@dataclass(frozen=True)
class Verification:
    """The result of ``verify_file``.

    Attributes:
        architecture: inferred from the weights.
        weights: digest of names, dtypes, shapes and values.
        top5: for a classifier, the classes with the largest logits for ``fixed_image``, and these logits.
    """

    architecture: Architecture
    weights: str
    top5: dict[int, float]


def verify_file(path: Path, ema: bool = False, prefix: str = "") -> Verification:
    """Load a file strictly into the model it belongs to, and run the model.

    For a detector or segmentor, that is the backbone. The reference implementations compute the outputs in float64,
    so machines agree in far more digits than are printed.

    Raises:
        WeightsError: if the file cannot be read, has no Spatial-Mamba, does not fit strictly, or gives outputs that
            are not finite.
    """
    state = model_weights(read_checkpoint(path), path, ema, prefix)
    architecture = architecture_of(state)
    if architecture is None:
        raise WeightsError(f"{path}: holds no weights of Spatial-Mamba")
    model = model_of(architecture, state, path)
    with torch.inference_mode(), use_backend("torch"):
        outputs = model.double()(fixed_image(architecture.in_chans))
    maps = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(output.isfinite().all() for output in maps):
        raise WeightsError(f"{path}: its outputs are not finite: the training diverged, or the file is damaged")
    top5 = {}
    if architecture.num_classes:
        logits, classes = outputs[0].topk(min(5, architecture.num_classes))
        top5 = dict(zip(classes.tolist(), logits.tolist(), strict=True))
    return Verification(architecture, weights_digest(state), top5)


def fixed_image(channels: int) -> Tensor:
    """The image (1, channels, 224, 224) in float64 for verification, computed exactly, from integers."""
    row, column = torch.arange(IMAGE_SIZE)[:, None], torch.arange(IMAGE_SIZE)
    planes = [(row * row * (3 + c) + column * (7 + 2 * c) + row * column) % 251 for c in range(channels)]
    return torch.stack(planes)[None].double() / 125 - 1


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights in the order of their names, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
