"""Measures effective receptive fields: the gradient of the central features with respect to each pixel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.errors import UserError
from ..models import SpatialMamba

FRACTIONS = (0.3, 0.5, 0.9, 0.99)  # of the contribution, whose areas are reported


@dataclass(frozen=True)
class ReceptiveField:
    """The contributions of all pixels to the central token of one stage.

    Attributes:
        contribution: (H, W), non-negative, in float64 on the CPU.
        centre: row and column of the pixel at the centre of the token's receptive field.
    """

    contribution: Tensor
    centre: tuple[int, int]

    def growth(self) -> tuple[Tensor, Tensor]:
        """Area and contribution of growing squares around the centre, clipped to the image.

        Returns:
            Fractions of the image and of the contribution, one entry per square; both end at 1.
        """
        height, width = self.contribution.shape
        rows, columns = torch.arange(height) - self.centre[0], torch.arange(width) - self.centre[1]
        ring = torch.maximum(rows.abs()[:, None], columns.abs()[None]).flatten()  # the first square with this pixel
        area = torch.bincount(ring).cumsum(0).double()
        inside = torch.bincount(ring, weights=self.contribution.flatten()).cumsum(0)
        return area / area[-1], inside / inside[-1]

    def reach(self, fraction: float) -> int:
        """Half width, in pixels, of the smallest square with at least this fraction of the contribution."""
        inside = self.growth()[1]
        return min(int((inside < fraction).sum()), len(inside) - 1)

    def area(self, fraction: float) -> float:
        """Area of the smallest square with at least this fraction of the contribution, as a fraction of the image.

        RepLKNet (arXiv 2203.06717) defines it for squares around the centre of the image.
        """
        return float(self.growth()[0][self.reach(fraction)])


def receptive_field(model: SpatialMamba, batches: Iterable[Tensor], stage: int) -> ReceptiveField:
    """Measure the effective receptive field of the central token of a stage.

    The features of the token, before the stage's downsampling and not normalised, are summed over channels. The
    absolute gradient of this sum is summed over colours and averaged over images (Luo et al., arXiv 1701.04128).

    Args:
        model: in evaluation mode, not fused.
        batches: at least one batch of images (B, 3, H, W), all of one size.
        stage: from 0.

    Raises:
        UserError: if the gradient is zero everywhere or not finite.
    """
    total, count = torch.zeros(()), 0
    for batch in batches:
        images = batch.detach().requires_grad_()
        features = model.forward_intermediates(
            images, indices=[stage], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )[0]
        assert isinstance(features, Tensor)
        row, column = features.shape[1] // 2, features.shape[2] // 2
        (gradient,) = torch.autograd.grad(features[:, row, column].sum(), images)
        total = total + gradient.double().abs().sum(dim=(0, 1)).cpu()
        count += len(batch)
    if not (total.isfinite().all() and total.sum() > 0):
        raise UserError("the gradient of the features is zero or not finite; are the weights of the model finite?")
    reduction = model.feature_info[stage]["reduction"]  # a convolution of stride 2 centres token i on 2 i
    return ReceptiveField(total / count, (reduction * row, reduction * column))


def noise_batches(count: int, size: int, device: torch.device, batch_size: int) -> Sequence[Tensor]:
    """Batches of normally distributed noise (B, 3, size, size), always the same; ``count`` images in total."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return noise.to(device).split(batch_size)
