"""Golden values; data sets of real images, a small config, and a finished run of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from spatial_mamba.classification.demo_data import write_digits
from spatial_mamba.classification.main import main

from .micro_models import GOLDEN
from .runs import MICRO


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Reference values of tiny, computed in float64."""
    with np.load(GOLDEN / "tiny.npz") as values:
        return dict(values)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def photos(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of real images, 9 to train and 5 to validate on each: numbers that divide by nothing."""
    root = tmp_path_factory.mktemp("photos") / "set"
    for split, count in (("train", 9), ("val", 5)):
        for digit in "012":
            (root / split / digit).mkdir(parents=True)
            for image in sorted((digits / split / digit).iterdir())[:count]:
                shutil.copy(image, root / split / digit)
    return root


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(yaml.safe_dump(MICRO))
    return path


@pytest.fixture(scope="session")
def trained(micro: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two epochs, the second with MESA."""
    output = tmp_path_factory.mktemp("trained")
    assert main(["--cfg", str(micro), "--data-path", str(photos), "--output", str(output)]) == 0
    return output / "micro" / "default"
