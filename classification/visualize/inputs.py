"""Prepare the images that pictures are made from, for the model and for display."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import UserError
from ..models.image_files import find_images, read_image
from ..models.preprocessing import NORMALISATION, Preprocessing
from ..models.trained import TrainedClassifier


def preprocessing_at(classifier: TrainedClassifier, size: int | None) -> Preprocessing:
    """The preprocessing of a classifier; ``size``, in pixels, replaces its image size."""
    return classifier.preprocessing if size is None else replace(classifier.preprocessing, image_size=size)


def single_image(path: Path) -> Path:
    """The single image that a path or pattern names.

    Raises:
        ImageFileError: if there is none.
        UserError: if there are several.
    """
    found = find_images([path])
    if len(found) > 1:
        raise UserError(f"{path}: {len(found)} images; name one of them, such as {found[0]}")
    return found[0]


def model_input(classifier: TrainedClassifier, paths: Sequence[Path], size: int | None = None) -> Tensor:
    """Read image files as a normalised batch (B, 3, size, size) on the model's device.

    Raises:
        ImageFileError: for a file that cannot be read.
        UserError: unless the model takes RGB images.
    """
    require_rgb(classifier)
    transform = preprocessing_at(classifier, size).transform()
    batch = torch.stack([transform(read_image(path)) for path in paths])
    return batch.to(next(classifier.model.parameters()).device)


def require_rgb(classifier: TrainedClassifier) -> None:
    """Raise UserError unless the model takes RGB images."""
    if classifier.model.in_chans != 3:
        raise UserError(f"the model takes images of {classifier.model.in_chans} channels; RGB is needed")


def visible_image(normalised: Tensor) -> np.ndarray:
    """Convert a normalised image (3, H, W) to RGB (H, W, 3) in 0..1."""
    mean, std = (torch.tensor(NORMALISATION[name])[:, None, None] for name in ("mean", "std"))
    return (normalised.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
