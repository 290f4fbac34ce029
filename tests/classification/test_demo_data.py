"""The data set of handwritten digits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba.classification.demo_data import write_digits
from spatial_mamba.kernels.errors import UserError


def test_digits_are_written_once_and_whole(digits: Path, tmp_path: Path) -> None:
    counts = {}
    for split in ("train", "val"):
        classes = sorted((digits / split).iterdir())
        assert [cls.name for cls in classes] == [str(i) for i in range(10)]
        counts[split] = [len(list(cls.iterdir())) for cls in classes]
    for train, val in zip(counts["train"], counts["val"], strict=True):
        assert val / (train + val) == pytest.approx(0.2, abs=0.005), "stratified"
    image = Image.open(next((digits / "val" / "3").iterdir()))
    assert (image.size, image.mode) == ((8, 8), "L") and np.asarray(image).max() > 128
    assert write_digits(digits).startswith("1437 training and 360 validation images")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="is not this data set"):
        write_digits(tmp_path / "other")
