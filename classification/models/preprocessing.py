"""Prepare images for a classifier in evaluation. The augmentation for training is in `classification.data`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

CROP_FRACTION = 224 / 256  # of the resized short side
SMALLEST_SIZE, LARGEST_SIZE = 32, 16384  # pixels
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
NORMALISATION: dict[str, Any] = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized and cropped for evaluation.

    Attributes:
        image_size: height and width of the result, in pixels.
        crop: resize the short side to 256/224 of the size and crop the centre; otherwise squash the image to the size.
        interpolation: ``"bicubic"``, ``"bilinear"``, ``"nearest"`` or ``"lanczos"``.
    """

    image_size: int = 224
    crop: bool = True
    interpolation: str = "bicubic"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's transform of RGB images to normalised tensors (3, image_size, image_size)."""
        return create_transform(
            input_size=self.image_size,
            interpolation=self.interpolation,
            crop_pct=CROP_FRACTION if self.crop else 1.0,
            crop_mode="center" if self.crop else "squash",
            **NORMALISATION,
        )


def preprocessing_of(config: Any) -> Preprocessing:
    """The preprocessing that the config of a checkpoint describes; missing keys have the values of the ImageNet recipe.

    Raises:
        ValueError: naming the key with an invalid value.
    """
    default = Preprocessing()
    size = _setting(config, "DATA", "IMG_SIZE", default.image_size)
    if not isinstance(size, int) or not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise ValueError(
            f"config key DATA.IMG_SIZE is {size!r}, not a size of {SMALLEST_SIZE} to {LARGEST_SIZE} pixels"
        )
    crop = _setting(config, "TEST", "CROP", default.crop)
    if not isinstance(crop, bool):
        raise ValueError(f"config key TEST.CROP is {crop!r}, not true or false")
    interpolation = _setting(config, "DATA", "INTERPOLATION", default.interpolation)
    if interpolation not in (*INTERPOLATIONS, "random"):
        raise ValueError(f"config key DATA.INTERPOLATION is {interpolation!r}, not one of {', '.join(INTERPOLATIONS)}")
    return Preprocessing(size, crop, default.interpolation if interpolation == "random" else interpolation)


def _setting(config: Any, section: str, key: str, default: Any) -> Any:
    entries = config.get(section) if isinstance(config, Mapping) else None
    return entries.get(key, default) if isinstance(entries, Mapping) else default
