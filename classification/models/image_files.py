"""Finds image files by path, folder or pattern, and reads them."""

import glob
import io
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from ...kernels.errors import UserError

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")  # made by macOS, network storage and file systems
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; Pillow starts programs for some others
LARGEST_ASPECT = 100  # the short side is resized to the model's size, so the long one can become huge


class ImageFileError(UserError):
    """A path is missing, not an image, or damaged; the one-line message names it."""


def is_hidden(name: str) -> bool:
    """Whether a component of a path starts with a dot or is one of ``SYSTEM_FOLDERS``."""
    parts = [part for part in name.split("/") if part != "."]
    return any(part.startswith(".") or part.removesuffix(".tar") in SYSTEM_FOLDERS for part in parts)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The images that ``paths`` name: files, folders (their direct contents), and patterns.

    Hidden files in a folder are ignored. A path that does not exist and contains ``*``, ``?`` or ``[`` is a pattern,
    where ``**`` matches any depth of folders.

    Raises:
        ImageFileError: naming a path that is missing, has the wrong ending, or holds or matches no image.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if re.match(r"https?:/", str(path)):
            url = str(path).replace(":/", "://", 1)  # Path has removed a slash
            raise ImageFileError(f"{url}: is a URL; download the image and give its path")
        if path.is_dir():
            visible = [p for p in path.iterdir() if not is_hidden(p.name)]
            found = [p for p in visible if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
            if not found:
                deeper = f"; for those in its subfolders: '{path}/**/*'" if any(p.is_dir() for p in visible) else ""
                raise ImageFileError(f"{path}: no images in this folder ({', '.join(IMAGE_ENDINGS)}){deeper}")
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


def read_image(path: str | PathLike[str]) -> Image.Image:
    """Read an image with ``open_image`` and rotate it by its EXIF orientation.

    Raises:
        ImageFileError: for a damaged file, or one without an image of 8 or 16 bits.
    """
    try:
        # From memory: a read beyond the end of a file would first allocate all that a damaged image asks for.
        return open_image(io.BytesIO(Path(path).read_bytes()), rotate=True)
    except Exception as error:
        reason = f"not one of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise ImageFileError(f"{path}: cannot be read as an image ({reason})") from error


def open_image(source: BinaryIO, rotate: bool = False) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel. 16-bit greyscale is scaled: divided by 257 and rounded.

    Args:
        source: an open file.
        rotate: rotate the image by its EXIF orientation. Pillow always does this for TIFF files.

    Raises:
        ValueError: for an aspect ratio above ``LARGEST_ASPECT``, and for floating-point or 32-bit pixels, whose range
            is unknown.
        Exception: of any kind, for a damaged file.
    """
    with Image.open(source, formats=FORMATS) as file:
        if max(file.size) > LARGEST_ASPECT * min(file.size):
            raise ValueError(
                f"{file.width} x {file.height} pixels; an aspect ratio above {LARGEST_ASPECT} is not supported"
            )
        kind, is_16_bit = file.mode, _is_16_bit(file)
        if kind in ("F", "I") and not is_16_bit:
            pixels = "floating-point" if kind == "F" else "32-bit integer"
            raise ValueError(f"{pixels} pixels have no known range; save it with 8 or 16 bits per channel")
        largest = 4095 if getattr(file, "tag_v2", {}).get(Base.BitsPerSample) == (12,) else 65535
        image = ImageOps.exif_transpose(file) if rotate else file
        if is_16_bit:
            values = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
        return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an open file is 16-bit greyscale. Pillow reports 32 bits for PGM, and in older versions for PNG."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
