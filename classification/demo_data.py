"""Scikit-learn's 1,797 handwritten digits as an ImageNet-style folder."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ..kernels.errors import UserError
from .data_folder import run_demo_data, write_folder

VAL_FRACTION = 0.2


def write_digits(folder: Path) -> str:
    """Write handwritten digits as ``FOLDER/{train,val}/{0..9}/*.png`` (8x8, grey).

    Every class is split 80/20, and the same images go to the same split every time.

    Returns:
        What the folder holds, in words.

    Raises:
        UserError: if the folder holds something else, or scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("scikit-learn, which holds the digits, is missing: pip install scikit-learn") from error

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    indices = np.arange(len(pixels))
    train, val = train_test_split(indices, test_size=VAL_FRACTION, stratify=digits.target, random_state=0)
    splits = {"train": train, "val": val}
    files = {f"{split}/{digits.target[i]}/{i:04d}.png": i for split in splits for i in splits[split]}

    def write(unfinished: Path) -> None:
        for name, index in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)

    write_folder(folder, files, write)
    return f"{len(train)} training and {len(val)} validation images of handwritten digits"


if __name__ == "__main__":
    sys.exit(run_demo_data("classification", write_digits))
