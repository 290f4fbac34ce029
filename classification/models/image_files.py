"""Finds the image files that a command line names, in files, folders and patterns, and reads them."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found")  # folders of macOS, of network storage and of file systems
# What ``open_image`` raises on files that it cannot read; a decompression bomb counts as damage.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageFileError(ValueError):
    """A path is missing, no image, or damaged; the one-line message names it."""


def is_hidden(name: str) -> bool:
    """Whether a part of a path, between slashes, starts with a dot or is in ``LEFT_BEHIND``."""
    return any(
        part.removesuffix(".tar") in LEFT_BEHIND or (part.startswith(".") and part != ".") for part in name.split("/")
    )


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files among ``paths``, directly in the folders among them, and matching the patterns among them.

    Hidden files in a folder, whose names start with a dot, are ignored.

    A path that exists is taken as it is; another one with ``*``, ``?`` or ``[`` in it is a pattern (``**`` for any
    depth of folders).

    Raises:
        ImageFileError: naming a path that is missing, has another ending, or holds or matches no image.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            visible = [p for p in path.iterdir() if not is_hidden(p.name)]
            found = [p for p in visible if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
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
    """A user's image, see ``open_image``, turned as its EXIF orientation says.

    Raises:
        ImageFileError: for a damaged file, or one that holds no image of 8 or 16 bits.
    """
    try:
        return open_image(path, turn=True)
    except UNREADABLE as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ImageFileError(f"{path}: cannot be read as an image ({reason})") from error


def open_image(source: Path | BinaryIO, turn: bool = False) -> Image.Image:
    """The whole image, in RGB with 8 bits per channel. Greyscale of 16 bits is scaled: divided by 257 and rounded.

    Args:
        source: path, or open file.
        turn: turn the image as its EXIF orientation says. Pillow turns TIFF files in any case.

    Raises:
        UNREADABLE: for a damaged file, or one that holds no image.
        ValueError: for floating-point or 32-bit pixels, whose range the file does not say.
    """
    with Image.open(source) as image:
        kind, is_16_bit = image.mode, _is_16_bit(image)
        if kind in ("F", "I") and not is_16_bit:
            pixels = "floating-point" if kind == "F" else "32-bit integer"
            raise ValueError(f"{pixels} pixels have no known range; save it with 8 or 16 bits per channel")
        largest = 4095 if getattr(image, "tag_v2", {}).get(Base.BitsPerSample) == (12,) else 65535
        if turn:
            image = ImageOps.exif_transpose(image)
        if is_16_bit:
            values = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
        return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an opened file is greyscale of 16 bits; Pillow gives PGM, and in older versions PNG, 32."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
