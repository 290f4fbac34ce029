"""Images with more than 8 bits per channel."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba.classification.data import ImageData
from spatial_mamba.classification.models.image_files import ImageFileError, read_image
from spatial_mamba.classification.readers import open_split
from spatial_mamba.kernels.errors import UserError


def ramp(folder: Path, name: str, mode: str) -> tuple[Path, np.ndarray]:
    """Write a (16, 16) grey image of dtype ``mode``; returns the path and the pixels in 8 bits."""
    grey = np.arange(256).reshape(16, 16)
    path = folder / name
    Image.fromarray((grey * 257 + (grey % 3 - 1) * 128).clip(0, 65535).astype(mode)).save(path)
    return path, np.repeat(grey[:, :, None], 3, axis=2)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_16_bit_images_keep_their_greys(name: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    path, expected = ramp(tmp_path / "train" / "a", name, "uint16")
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)
    data = ImageData(open_split(str(tmp_path), "train"), np.asarray)
    np.testing.assert_array_equal(data[0, 0][0], expected)


def test_12_bit_images_keep_their_greys(tmp_path: Path) -> None:
    """Files as some microscopes write them: uncompressed, two pixels in three bytes."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 8 * 12 + 4), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    pixels = bytes.fromhex("000800fff3e8")
    path = tmp_path / "grey.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels)
    assert np.asarray(read_image(str(path)))[0, :, 0].tolist() == [0, 128, 255, 62]


@pytest.mark.parametrize(("mode", "pixels"), [("float32", "floating-point"), ("int32", "32-bit integer")])
def test_images_without_a_known_range_are_refused(mode: str, pixels: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    path, _ = ramp(tmp_path / "train" / "a", "grey.tif", mode)
    message = rf"{path}: .*\({pixels} pixels have no known range; save it with 8 or 16 bits per channel"
    with pytest.raises(ImageFileError, match=message):
        read_image(path)
    with pytest.raises(UserError, match=message):
        ImageData(open_split(str(tmp_path), "train"), np.asarray)[0, 0]
