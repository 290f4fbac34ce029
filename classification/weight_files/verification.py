"""Digests that tell whether two files hold the same weights, and whether two machines compute the same with them."""

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
_STEPS = 10**6  # of the largest logit: far coarser than the roundings of float64, far finer than any change of a weight


@dataclass(frozen=True)
class Verification:
    """What a file was found to hold.

    Attributes:
        architecture: read off the weights.
        weights: digest of names, dtypes, shapes and values.
        outputs: digest of the logits, or the feature maps of a backbone, for ``fixed_image``.
        top5: the classes with the largest logits, for a classifier.
    """

    architecture: Architecture
    weights: str
    outputs: str
    top5: tuple[int, ...]


def verify_file(path: Path, ema: bool = False, prefix: str = "") -> Verification:
    """Load a file strictly into the model it belongs to, and compute with it.

    Of a detector or segmentor that is the backbone. The outputs are computed in float64 by the definitions of the
    operators, and rounded: machines find the same digest, unless a value happens to lie on the edge of a rounding.

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
    top5 = outputs[0].topk(min(5, architecture.num_classes)).indices.tolist() if architecture.num_classes else ()
    return Verification(architecture, weights_digest(state), outputs_digest(maps), tuple(top5))


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


def outputs_digest(outputs: tuple[Tensor, ...]) -> str:
    """SHA-256 of tensors in float64, each rounded to a millionth of its largest magnitude."""
    digest = hashlib.sha256()
    for output in outputs:
        scale = output.abs().max().clamp(min=torch.finfo(output.dtype).tiny)
        digest.update((output / scale * _STEPS).round().long().contiguous().numpy())
    return digest.hexdigest()
