"""Compares an exported file with its model on fixed images."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.spatial_mamba import SpatialMambaEncoder
from .programs import Size, height_and_width

BATCHES = (1, 2)
Function = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def fixed_images(model: SpatialMambaEncoder, size: Size, batch: int) -> Tensor:
    """Normally distributed images (batch, in_chans, height, width) on the CPU, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, model.in_chans, *height_and_width(size), generator=generator)


def largest_difference(function: Function, model: SpatialMambaEncoder, size: Size) -> float:
    """The largest difference from the model's outputs for batches of 1 and 2, relative to the largest output.

    Args:
        function: the exported file, as a function of images on the CPU.
        model: the model, on any device and in any dtype.
        size: height and width of the images.

    Returns:
        A fraction; NaN if any output is NaN.
    """
    like = next(model.parameters())
    differences = []
    for batch in BATCHES:
        images = fixed_images(model, size, batch)
        with torch.inference_mode():
            expected = model(images.to(like.device, like.dtype))
        for actual, reference in zip(_tuple(function(images)), _tuple(expected), strict=True):
            reference = reference.float().cpu()
            error = (actual.float().cpu() - reference).abs().max() / reference.abs().max()
            differences.append(error)
    return torch.stack(differences).max().item()


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
