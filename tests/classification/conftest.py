"""Golden values; data sets of real images, a small config, and a finished run of it.

The trainer is imported where it is used: tests on GPUs run without its packages.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from .micro_models import GOLDEN
from .runs import copy_photos


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Reference values of tiny, computed in float64."""
    with np.load(GOLDEN / "tiny.npz") as values:
        return dict(values)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spatial_mamba.classification.demo_data import write_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def photos(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of real images, 9 for training and 5 for validation each: numbers that no batch size divides."""
    root = tmp_path_factory.mktemp("photos") / "set"
    copy_photos(digits, root, train=9, val=5)
    return root


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file: a tiny model and a short recipe, with every part of the recipe switched on."""
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text("""
        DATA: {IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}
        MODEL: {NAME: micro, DROP_PATH_RATE: 0.2, SPATIAL_MAMBA: {EMBED_DIM: 4, DEPTHS: [1, 1, 1, 1]}}
        TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 0.05, MODEL_EMA_DECAY: 0.5}
        AUG: {MESA: 1.0, MESA_START: 0.5}
        AMP_ENABLE: False
        DEVICE: cpu
        PRINT_FREQ: 1
    """)
    return path


@pytest.fixture(scope="session")
def trained(micro: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two epochs, the second with MESA."""
    from spatial_mamba.classification.main import main

    output = tmp_path_factory.mktemp("trained")
    assert main(["--cfg", str(micro), "--data-path", str(photos), "--output", str(output)]) == 0
    return output / "micro" / "default"


@pytest.fixture
def continued(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which the runs with output folder ``tmp_path`` continue."""
    return shutil.copytree(trained, tmp_path / "micro" / "default")
