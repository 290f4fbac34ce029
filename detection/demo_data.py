"""Scenes of handwritten digits on photographs, as a data set in COCO's format."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..classification.data_folder import run_demo_data, write_folder
from .openmmlab.digit_scenes import Scene, scenes

COUNTS = {"train": 1200, "val": 160}
CATEGORIES = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]


def write_digits(folder: Path, counts: Mapping[str, int] = COUNTS) -> str:
    """Write scenes of digits: ``FOLDER/{train,val}/*.png`` and ``FOLDER/annotations/instances_{train,val}.json``.

    Args:
        counts: images per split.

    Returns:
        What the folder holds, in words.

    Raises:
        UserError: if the folder holds something else, or scikit-learn is missing.
    """
    files = [f"{split}/{_name(number)}" for split, count in counts.items() for number in range(count)]
    files += [f"annotations/instances_{split}.json" for split in counts]

    def write(unfinished: Path) -> None:
        (unfinished / "annotations").mkdir()
        for split, count in counts.items():
            (unfinished / split).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for number, scene in enumerate(scenes(split, count)):
                Image.fromarray(scene.image).save(unfinished / split / _name(number))
                height, width = scene.image.shape[:2]
                images.append({"id": number + 1, "file_name": _name(number), "height": height, "width": width})
                annotations += _annotations(scene, number + 1, len(annotations) + 1)
            content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
            (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))

    write_folder(folder, files, write)
    return f"{counts['train']} training and {counts['val']} validation images of digits on photographs, for COCO"


def outline(mask: np.ndarray) -> list[list[int]]:
    """Polygons [x0, y0, x1, y1, ...] along the outer edges of pixels that together cover exactly the (H, W) mask.

    COCO's polygons have no holes, so a component with a hole is cut in two at the hole.
    """
    import cv2  # installed with mmcv, which drawing scenes does not need

    # At twice the size, pixel x spans 2x to 2x + 1, which represent its edges x and x + 1.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return []
    rings = [(contour[:, 0] + 1) // 2 for contour in contours]
    holes = [ring for ring, (_, _, _, parent) in zip(rings, hierarchy[0], strict=True) if parent >= 0]
    if holes:
        columns = np.arange(mask.shape[1])
        cut = (holes[0][:, 0].min() + holes[0][:, 0].max() + 1) // 2
        return outline(mask & (columns < cut)) + outline(mask & (columns >= cut))
    # Inner corners occur twice.
    return [ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)].ravel().tolist() for ring in rings]


def _name(number: int) -> str:
    return f"{number + 1:06d}.png"


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """One COCO annotation per digit of the scene, with a tight box around its visible pixels."""
    annotations = []
    for number, (value, mask) in enumerate(zip(scene.classes.tolist(), scene.masks, strict=True)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": value + 1,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(mask.sum()),
                "segmentation": outline(mask),
                "iscrowd": 0,
            }
        )
    return annotations


if __name__ == "__main__":
    sys.exit(run_demo_data("detection", write_digits))
