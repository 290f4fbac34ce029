"""Scenes of handwritten digits on photographs, as a data set in ADE20K's layout."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..classification.data_folder import run_demo_data, write_folder
from ..detection.openmmlab.digit_scenes import Scene, scenes

COUNTS = {"train": 3200, "val": 160}
FOLDERS = {"train": "training", "val": "validation"}


def write_digits(folder: Path, counts: Mapping[str, int] = COUNTS) -> str:
    """Write scenes of digits: ``FOLDER/images/{training,validation}/*.jpg``, label maps in ``FOLDER/annotations``.

    Args:
        counts: images per split.

    Returns:
        What the folder holds, in words.

    Raises:
        UserError: if the folder holds something else, or scikit-learn is missing.
    """
    stems = {split: [f"{FOLDERS[split]}/{number + 1:06d}" for number in range(counts[split])] for split in counts}
    files = [f"images/{stem}.jpg" for split in stems for stem in stems[split]]
    files += [f"annotations/{stem}.png" for split in stems for stem in stems[split]]

    def write(unfinished: Path) -> None:
        for split, count in counts.items():
            for kind in ("images", "annotations"):
                (unfinished / kind / FOLDERS[split]).mkdir(parents=True)
            for stem, scene in zip(stems[split], scenes(split, count), strict=True):
                Image.fromarray(scene.image).save(unfinished / f"images/{stem}.jpg", quality=95)
                Image.fromarray(label_map(scene)).save(unfinished / f"annotations/{stem}.png")

    write_folder(folder, files, write)
    return f"{counts['train']} training and {counts['val']} validation images of digits on photographs, with label maps"


def label_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8: 1 for the photograph, 2..11 for the digits 0..9. ADE20K's 0, "ignored", does not occur."""
    labels = np.ones(scene.image.shape[:2], np.uint8)
    for value, mask in zip(scene.classes, scene.masks, strict=True):
        labels[mask] = value + 2
    return labels


if __name__ == "__main__":
    sys.exit(run_demo_data("segmentation", write_digits))
