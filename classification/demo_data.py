"""Writes scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: ``python -m ... digits FOLDER``."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import InputError
from .models.home import with_home

VAL_SHARE = 0.2


def write_digits(folder: Path) -> dict[str, int]:
    """Write ``folder/{train,val}/{0..9}/*.png`` (8x8 grey), split 80/20 with the classes in equal shares.

    The same images go to the same split every time. The folder appears whole or not at all.

    Returns:
        The number of images of each split.

    Raises:
        InputError: if the folder holds something else, or scikit-learn is missing.
    """
    if folder.exists():
        counts = {split: len(list(folder.glob(f"{split}/[0-9]/*.png"))) for split in ("train", "val")}
        if sum(counts.values()) == 1797:
            return counts
        raise InputError(f"{folder}: exists and is not the digits data set; remove it or choose another folder")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("scikit-learn, which holds the digits, is missing: pip install scikit-learn") from error

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    train, val = train_test_split(np.arange(len(pixels)), test_size=VAL_SHARE, stratify=digits.target, random_state=0)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            path = unfinished / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)
    unfinished.rename(folder)
    return {"train": len(train), "val": len(val)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = with_home(parser.parse_args().folder)
    try:
        counts = write_digits(folder)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {counts['train']} training and {counts['val']} validation images of handwritten digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
