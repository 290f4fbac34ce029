"""Samplers, augmentation, images that cannot be read."""

import itertools
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from spatial_mamba.classification import data
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import (
    EvalSampler,
    ImageData,
    TrainSampler,
    build_train_loader,
    build_transform,
    build_val_loader,
    check_classes,
)
from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.models.image_files import read_image
from spatial_mamba.classification.readers import open_split
from spatial_mamba.classification.seeding import seed_everything
from spatial_mamba.kernels.errors import UserError

from .runs import CPU, pack


def test_splits_must_number_their_classes_alike(micro: Path) -> None:
    """A class list puts 2 before 10; folders of these names are sorted as text."""
    config, _ = load_config(micro)
    assert check_classes(config, ["0", "1"], ["0", "1"]) == 2
    with pytest.raises(UserError, match="number them in different orders"):
        check_classes(config, ["10", "2"], ["2", "10"])
    with pytest.raises(UserError, match="one class folder, images; training needs two or more"):
        check_classes(config, ["images"], ["images"])


def test_damaged_archive_members_count_as_unreadable(photos: Path, micro: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / "set" / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted((photos / split).glob("*/*.png")):
                archive.writestr(f"{file.parent.name}/{file.name}", bytes(2000) + file.read_bytes())
            first = archive.infolist()[0]
    with (tmp_path / "set" / "train.zip").open("r+b") as file:
        file.seek(len(first.filename) + 32)  # into the compressed data behind the header
        file.write(b"\xff" * 8)
    dataset = ImageData(open_split(str(tmp_path / "set"), "train"), build_transform(load_config(micro)[0], True))
    with pytest.raises(UserError, match="unreadable image"):
        dataset[0, 0]


def test_exif_rotates_user_images_always_and_data_sets_on_request(micro: Path, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (64, 32)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 32, 32))
    exif[0x0112] = 6  # rotate clockwise: the white half is then at the top
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        path = tmp_path / split / "a" / "photo.jpg"
        image.save(path, exif=exif)
    assert read_image(path).size == (32, 64)
    for turn in (False, True):
        config, _ = load_config(
            micro, [("DATA.DATA_PATH", str(tmp_path)), ("DATA.EXIF_ORIENTATION", turn), ("TEST.CROP", False)]
        )
        corner = build_val_loader(config, CPU).dataset[0, 0][0][0][2, -3]
        assert (corner > 0) == turn


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samplers_yield_every_image_once(world_size: int) -> None:
    processes = [Process(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    assert sorted(i for p in processes for i, _ in EvalSampler(10, p)) == list(range(10))

    for sharded in (False, True):
        samplers = [TrainSampler(10, p, seed=1, sharded=sharded) for p in processes]
        epochs = []
        for epoch in (0, 1, 0):
            for sampler in samplers:
                sampler.epoch = epoch
            shares = [list(sampler) for sampler in samplers]
            assert {len(share) for share in shares} == {10 // world_size} == {len(samplers[0])}
            indices = [i for share in shares for i, _ in share]
            assert len(set(indices)) == len(indices), "no image twice in an epoch"
            if sharded:
                assert all(i % world_size == rank for rank, share in enumerate(shares) for i, _ in share)
            epochs.append(shares)
        assert epochs[0] == epochs[2] != epochs[1]


def test_augmentation_is_a_function_of_the_seed(photos: Path, micro: Path) -> None:
    config, _ = load_config(micro)
    dataset = ImageData(open_split(str(photos), "train"), build_transform(config, is_training=True))
    seed_everything(0)
    first = dataset[3, 7][0]
    state = torch.get_rng_state()
    other = dataset[3, 8][0]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.randn(5)
    assert torch.equal(dataset[3, 7][0], first)
    assert not torch.equal(other, first)


@pytest.mark.parametrize(("zipped", "mode"), [(False, "part"), (True, None), (True, "part"), (True, "no")])
def test_processes_keep_their_own_images_only_with_zip(
    photos: Path, micro: Path, tmp_path: Path, zipped: bool, mode: str | None
) -> None:
    settings = [("DATA.DATA_PATH", str(pack(photos, "zip", tmp_path) if zipped else photos))]
    settings += [("DATA.ZIP_MODE", zipped), *([("DATA.CACHE_MODE", mode)] if mode else [])]
    config, _ = load_config(micro, settings)
    process = Process(1, 2, torch.device("cpu"))
    seen = set()
    loader = build_train_loader(config, process)
    for loader.sampler.epoch in range(40):
        seen |= {index for index, _ in loader.sampler}
    assert seen == (set(range(1, 27, 2)) if zipped and mode != "no" else set(range(27)))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original", "3a"])
def test_augmentation_of_any_strength_works(policy: str) -> None:
    config, _ = load_config("spatialmamba_tiny", [("AUG.AUTO_AUGMENT", policy)])
    step = next(
        step for step in build_transform(config, is_training=True).transforms if "ugment" in type(step).__name__
    )
    operations = [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]
    assert operations
    photo = Image.linear_gradient("L").convert("RGB")
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        assert operation(photo).size == photo.size
    for operation in operations:
        if operation.name == "PosterizeIncreasing" and operation.magnitude == 10:
            assert operation(photo).getextrema() == ((0, 0),) * 3  # it keeps no bits


def test_loader_processes_keep_quiet_about_lost_connections(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A thread of theirs would print its own traceback below the error that stops the run."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(data, "ignore_signals", lambda worker: None)
    data._start_loader_process(0)
    for error, printed in ((ConnectionResetError, False), (EOFError, False), (ValueError, True)):
        sys.excepthook(error, error(), None)
        assert (error.__name__ in capsys.readouterr().err) == printed
