"""Finds the image files that a command line names, in files, folders and patterns, and reads them."""

import glob
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFileError(ValueError):
    """A path is missing, no image, or damaged; the one-line message names it."""


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files among ``paths``, directly in the folders among them, and matching the patterns among them.

    A path that exists is taken as it is; another one with ``*``, ``?`` or ``[`` in it is a pattern (``**`` for any
    depth of folders).

    Raises:
        ImageFileError: naming a path that is missing, has another ending, or holds or matches no image.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
            if not found:
                raise ImageFileError(f"{path}: no images in this folder ({', '.join(IMAGE_ENDINGS)})")
        elif path.is_file():
            if path.suffix.lower() not in IMAGE_ENDINGS:
                raise ImageFileError(f"{path}: not an image file ({', '.join(IMAGE_ENDINGS)})")
            found = [path]
        elif glob.has_magic(str(path)):
            matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207, Path.glob refuses absolute patterns
            found = [p for p in matches if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
            if not found:
                raise ImageFileError(f"{path}: no image matches this pattern ({', '.join(IMAGE_ENDINGS)})")
        else:
            raise ImageFileError(f"{path}: no such image or folder")
        images += sorted(found)
    return images


def read_image(path: Path) -> Image.Image:
    """The whole image, in RGB.

    Raises:
        ImageFileError: for a damaged file, or one that holds no image.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ImageFileError(f"{path}: cannot be read as an image ({reason})") from error
