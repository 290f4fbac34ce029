"""Checks that a file holds a whole model that computes, and gives the digest of its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import use_backend
from ..models.architecture import Architecture, architecture_of
from ..models.trained import model_of
from ..models.weights import (
    WeightsError,
    ema_state_dict_of,
    encoder_weights,
    read_checkpoint,
    state_dict_of,
)

IMAGE_SIZE = 224


@dataclass(frozen=True)
class Verification:
    """What a file was found to hold.

    Attributes:
        architecture: read off the weights.
        weights: digest of names, dtypes, shapes and values.
        top5: the classes with the largest logits for ``fixed_image``, and their logits, of a classifier.
    """

    architecture: Architecture
    weights: str
    top5: dict[int, float]


def verify_file(path: Path, ema: bool = False, prefix: str = "") -> Verification:
    """Load a file strictly into the model it belongs to, and compute with it.

    Of a detector or segmentor that is the backbone. The outputs are computed in float64 by the reference
    implementations, so machines agree to far more digits than are printed.

    Raises:
        WeightsError: if the file cannot be read, holds no Spatial-Mamba, does not fit one strictly, or does not compute
            finite numbers.
    """
    checkpoint = read_checkpoint(path)
    state = ema_state_dict_of(checkpoint, path) if ema else state_dict_of(checkpoint, path)
    state = encoder_weights(state, path, prefix)
    architecture = architecture_of(state)
    if architecture is None:
        raise WeightsError(f"{path}: holds no weights of Spatial-Mamba")
    model = model_of(architecture, state, path)
    with torch.inference_mode(), use_backend("torch"):
        outputs = model.double()(fixed_image(architecture.in_chans))
    maps = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(output.isfinite().all() for output in maps):
        raise WeightsError(f"{path}: computes infinite values: its training has diverged, or the file is damaged")
    top5 = {}
    if architecture.num_classes:
        logits, classes = outputs[0].topk(min(5, architecture.num_classes))
        top5 = dict(zip(classes.tolist(), logits.tolist(), strict=True))
    return Verification(architecture, weights_digest(state), top5)


def fixed_image(channels: int) -> Tensor:
    """The image (1, channels, 224, 224) in float64 that files are verified with: whole numbers, computed exactly."""
    row, column = torch.arange(IMAGE_SIZE)[:, None], torch.arange(IMAGE_SIZE)
    planes = [(row * row * (3 + c) + column * (7 + 2 * c) + row * column) % 251 for c in range(channels)]
    return torch.stack(planes)[None].double() / 125 - 1


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights in the order of their names, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
