"""Helpers of the trainer's tests: its arguments, comparisons of its results, other forms of a data set."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_mamba.classification.distributed import Process

CPU = Process(0, 1, torch.device("cpu"))


def options(micro: Path, photos: Path, output: Path, *more: str) -> list[str]:
    return ["--cfg", str(micro), "--data-path", str(photos), "--output", str(output), *more]


def copy_photos(digits: Path, root: Path, **counts: int) -> None:
    """Copy the first images of three classes of the digits, as many per class and split as ``counts`` says."""
    for split, count in counts.items():
        for digit in "012":
            (root / split / digit).mkdir(parents=True)
            for image in sorted((digits / split / digit).iterdir())[:count]:
                shutil.copy(image, root / split / digit)


def records(run: Path) -> list[dict[str, Any]]:
    """What a run has recorded of its epochs."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def accuracy_lines(text: str) -> list[str]:
    return [line[line.index("acc@1") :].split(", loss")[0] for line in text.splitlines() if "acc@1" in line]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, through nested containers."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def after_calls(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, count: int, action: Callable[[], None]
) -> None:
    """Let a function do something else, too, when it has been called ``count`` times."""
    function, calls = getattr(module, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls[0] += 1
        if calls[0] == count:
            action()
        return result

    monkeypatch.setattr(module, name, wrapped)


def pack(root: Path, form: str, folder: Path) -> Path:
    """Write the images of ``root`` in another form."""
    target = folder / form
    target.mkdir()
    for split in ("train", "val"):
        files = sorted(file for file in (root / split).rglob("*") if file.is_file())
        if form == "tar":
            with tarfile.open(target / f"{split}.tar", "w") as archive:
                for file in files:
                    archive.add(file, file.relative_to(root / split))
        elif form in ("tar per class", "tar of tars"):
            (target / split).mkdir()
            for cls in sorted(folder for folder in (root / split).iterdir() if folder.is_dir()):
                with tarfile.open(target / split / f"{cls.name}.tar", "w") as archive:
                    for file in sorted(cls.iterdir()):
                        archive.add(file, file.name)
            if form == "tar of tars":
                (target / split / "._0.tar").write_text("metadata of macOS")
                with tarfile.open(target / f"{split}.tar", "w") as archive:
                    archive.add(target / split, ".")
                shutil.rmtree(target / split)
        else:
            with zipfile.ZipFile(target / f"{split}.zip", "w") as archive:
                for file in files:
                    prefix = f"{split}/" if form == "zip with a folder" else ""
                    archive.write(file, prefix + file.relative_to(root / split).as_posix())
            if form == "zip with a map":
                lines = [f"{f.relative_to(root / split).as_posix()}\t{f.parent.name}\n" for f in files]
                (target / f"{split}_map.txt").write_text("".join(lines))
    return target


def renamed(photos: Path, folder: Path, names: dict[str, str]) -> Path:
    """Copy the photos under other class names; classes without a new name are left out."""
    for split in ("train", "val"):
        for old, new in names.items():
            shutil.copytree(photos / split / old, folder / split / new)
    return folder
