"""From image files to what a classifier is evaluated on; training augments in `classification.data`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

CROP_SHARE = 224 / 256  # of the short side that the crop keeps
SMALLEST_SIZE, LARGEST_SIZE = 32, 16384  # pixels
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
NORMALISATION = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to the size of a model's evaluation.

    Attributes:
        image_size: height and width in pixels of the result.
        crop: resize the short side to 256/224 of the size and crop the centre, else squash the image to the size.
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
            crop_pct=CROP_SHARE if self.crop else 1.0,
            crop_mode="center" if self.crop else "squash",
            **NORMALISATION,
        )


def preprocessing_of(config: Any) -> Preprocessing:
    """What a config, as checkpoints hold it, says of evaluation; the ImageNet recipe where it says nothing.

    Raises:
        ValueError: naming the key, for a value that means nothing.
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
