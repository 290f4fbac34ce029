"""The effective receptive field: how much each pixel moves the features in the middle, by gradients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.errors import UserError
from ..models import SpatialMamba

SHARES = (0.3, 0.5, 0.9, 0.99)  # of the contribution, whose areas are told


@dataclass(frozen=True)
class ReceptiveField:
    """The contributions of all pixels to the centre token of one stage.

    Attributes:
        contribution: (H, W), not negative, float64, on the CPU.
        centre: the pixel, row and column, that the token's own field is centred on.
    """

    contribution: Tensor
    centre: tuple[int, int]

    def growth(self) -> tuple[Tensor, Tensor]:
        """How area and contribution grow with squares about the centre, cut off at the borders of the image.

        Returns:
            Shares of the image, and shares of the contribution, of ever larger squares; both end at 1.
        """
        height, width = self.contribution.shape
        rows, columns = torch.arange(height) - self.centre[0], torch.arange(width) - self.centre[1]
        ring = torch.maximum(rows.abs()[:, None], columns.abs()[None]).flatten()  # the square that a pixel first is in
        area = torch.bincount(ring).cumsum(0).double()
        inside = torch.bincount(ring, weights=self.contribution.flatten()).cumsum(0)
        return area / area[-1], inside / inside[-1]

    def reach(self, share: float) -> int:
        """How far, in pixels from the centre, the smallest square reaches that holds a share of the contribution."""
        inside = self.growth()[1]
        return min(int((inside < share).sum()), len(inside) - 1)

    def area(self, share: float) -> float:
        """The share of the image that the smallest square covers which holds a share of the contribution.

        As in RepLKNet (arXiv 2203.06717), there for squares about the middle of the image.
        """
        return float(self.growth()[0][self.reach(share)])


def receptive_field(model: SpatialMamba, batches: Iterable[Tensor], stage: int) -> ReceptiveField:
    """Measure the effective receptive field of a stage's centre token.

    The features of the token, in front of the stage's downsampling and not normalised, are summed over channels; the
    absolute gradient of the sum is summed over the colours and averaged over the images (Luo et al.,
    arXiv 1701.04128).

    Args:
        model: in evaluation mode, not fused.
        batches: images (B, 3, H, W), of one size; at least one.
        stage: from 0.

    Raises:
        UserError: where the gradient is zero everywhere, or not finite.
    """
    total, count = torch.zeros(()), 0
    for batch in batches:
        images = batch.detach().requires_grad_()
        (features,) = model.forward_intermediates(
            images, indices=[stage], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        row, column = features.shape[1] // 2, features.shape[2] // 2
        (gradient,) = torch.autograd.grad(features[:, row, column].sum(), images)
        total = total + gradient.double().abs().sum(dim=(0, 1)).cpu()
        count += len(batch)
    if not (total.isfinite().all() and total.sum() > 0):
        raise UserError("the gradient of the features is zero or not finite; are the weights of the model finite?")
    reduction = model.feature_info[stage]["reduction"]  # each convolution of stride 2 centres token i on 2 i
    return ReceptiveField(total / count, (reduction * row, reduction * column))


def noise_batches(count: int, size: int, device: torch.device, batch_size: int) -> Sequence[Tensor]:
    """Batches of normally distributed noise (B, 3, size, size), the same at every call; ``count`` images in all."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return noise.to(device).split(batch_size)
