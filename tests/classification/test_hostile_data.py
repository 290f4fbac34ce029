"""Hostile data sets, images, configs and records: one clear error or a counted skip, in little time and memory."""

import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import ImageData
from spatial_mamba.classification.models.image_files import ImageFileError, read_image
from spatial_mamba.classification.readers import open_split
from spatial_mamba.classification.run_log import _drop_epochs
from spatial_mamba.classification.visualize.run_records import read_run
from spatial_mamba.kernels.command_line import printable, run_command
from spatial_mamba.kernels.errors import UserError

from .runs import records

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("fuzz_image_*")), ids=lambda path: path.stem)
def test_damaged_images_and_other_formats_are_refused(path: Path) -> None:
    with pytest.raises(ImageFileError, match=f"{path.name}: cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize("name", ["idat_2e31.png", "pax_header.tar"])
def test_headers_cannot_ask_for_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{Path(name).suffix}"
    shutil.copy(HOSTILE / name, path)
    tracemalloc.start()
    try:
        if path.suffix == ".png":
            read_image(path)
        else:
            with pytest.raises(UserError, match=r"train\.tar: not a readable tar archive"):
                open_split(str(tmp_path), "train")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_only_the_named_formats_are_opened(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.eps")
    (tmp_path / "picture.eps").rename(tmp_path / "picture.jpg")
    with pytest.raises(ImageFileError, match="not one of BMP, JPEG, PNG, PPM, TIFF, WEBP"):
        read_image(tmp_path / "picture.jpg")


def test_extreme_aspect_ratios_are_refused(tmp_path: Path) -> None:
    Image.new("L", (1, 3000)).save(tmp_path / "line.png")
    with pytest.raises(ImageFileError, match="1 x 3000 pixels; an aspect ratio above 100 is not supported"):
        read_image(tmp_path / "line.png")
    Image.new("L", (10, 1000)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png").size == (10, 1000)


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("fuzz_zipset_*")), ids=lambda path: path.stem)
def test_damaged_archives_are_an_error_or_unreadable_images(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "train.zip")
    try:
        data = ImageData(open_split(str(tmp_path), "train"), np.asarray, skip_unreadable=False)
    except UserError as error:
        assert "train.zip: " in str(error)
        return
    refused = 0
    for index in range(len(data)):
        try:
            data[index, 0]
        except UserError as error:
            assert "unreadable image" in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("name", ["fuzz_map_1_2", "fuzz_map_1_2329", "fuzz_map_1_11433", "label_3e7"])
def test_damaged_lists_name_the_line(name: str, tmp_path: Path) -> None:
    shutil.copy(HOSTILE / f"{name}.txt", tmp_path / "train_map.txt")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for line in (HOSTILE / f"{name}.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            archive.writestr(line.partition("\t")[0].replace("\0", ""), b"")
    with pytest.raises(UserError, match=r"train_map\.txt, line \d+: "):
        open_split(str(tmp_path), "train")


def test_a_member_that_grows_is_an_unreadable_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.png", bytes(300 * 2**20), compresslevel=1)
    data = ImageData(open_split(str(tmp_path), "train"), np.asarray)
    with pytest.raises(UserError, match=r"x\.png: unreadable image \(314,572,800 bytes, more than 268,435,456\)"):
        data[0, 0]


def test_links_cannot_multiply_the_members_of_a_tar(tmp_path: Path) -> None:
    inner = tmp_path / "inner.tar"
    with tarfile.open(inner, "w") as archive:
        for number in range(100):
            archive.addfile(tarfile.TarInfo(f"{number}.png"))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(inner, "0.tar")
        for number in range(1, 200):
            link = tarfile.TarInfo(f"{number}.tar")
            link.type, link.linkname = tarfile.SYMTYPE, "0.tar"
            archive.addfile(link)
    with pytest.raises(UserError, match="links repeat its members"):
        open_split(str(tmp_path), "train")


def test_pipes_and_devices_are_not_images(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(photos, tmp_path / "set")
    os.mkfifo(tmp_path / "set/train/0/pipe.png")
    (tmp_path / "set/train/0/device.png").symlink_to("/dev/zero")
    assert len(open_split(str(tmp_path / "set"), "train")) == len(open_split(str(photos), "train"))
    assert "ignored 2 files" in caplog.text


def bomb(levels: int) -> str:
    """YAML with 2**levels values in a few lines."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(40), "more than 10,000 values"),
        ("TAG: &a [*a]", "20 levels"),
        ("TAG: " + "[" * 5000 + "]" * 5000, "not valid YAML"),
        ("SEED: 0x_", "not valid YAML"),
        ("COMPILE: !!bool x", "not valid YAML"),
        ("SEED: " + "9" * 5000, "not valid YAML"),
        ("TAG: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("#" * 100_001, "more than 100,000 characters"),
        ("BASE: [/dev/zero]", "/dev/zero: cannot read this config file (not a file)"),
        ("MODEL: {SPATIALMAMBA: {EMBED_DIM: 1000000000}}", "EMBED_DIM is 1000000000; it must be 1 to 4,096"),
        ("MODEL: {SPATIALMAMBA: {DEPTHS: [99999999]}}", "DEPTHS is [99999999]; it must be a list of"),
        ("DATA: {IMG_SIZE: 10000000}", "DATA.IMG_SIZE is 10000000; it must be 32 to 16,384"),
        ("TRAIN: {EPOCHS: '{[]: 1}'}", "TRAIN.EPOCHS takes a whole number, got '{[]: 1}'"),
        ("TRAIN: {MESA: '" + "-" * 90_000 + "1'}", "AUG.MESA takes a number, got '---"),
    ],
    ids=["aliases", "endless", "nested", "hexadecimal", "boolean", "digits", "object", "long", "device", "width",
         "depth", "size", "unhashable", "nested text"],
)  # fmt: skip
def test_hostile_configs_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "own.yaml")
    assert words in str(error.value)


def test_dates_in_configs_are_texts(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("TAG: 2026-11-26\n")
    assert load_config(tmp_path / "own.yaml")[0].TAG == "2026-11-26"


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("fuzz_metrics_*")), ids=lambda path: path.stem)
def test_damaged_records_do_not_stop_a_run(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "metrics.jsonl")
    try:
        read_run(tmp_path, "run")
    except UserError as error:
        assert "metrics.jsonl, line " in str(error)
    _drop_epochs(tmp_path / "metrics.jsonl", 1)
    assert [record["epoch"] for record in records(tmp_path)] == [0]


def test_control_characters_are_escaped_and_errors_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("naïve \x1b[31mred\x07") == "naïve \\x1b[31mred\\x07"

    def command() -> None:
        raise UserError("\x1b]0;title\x07" + "x" * 10_000)

    assert run_command(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: \\x1b]0;title\\x07x") and len(error) < 2100
