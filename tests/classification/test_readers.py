"""Images in folders and archives: the same samples and classes in every form."""

import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from spatial_mamba.classification.models.image_files import find_images
from spatial_mamba.classification.readers import CachedReader, open_split
from spatial_mamba.kernels.errors import UserError

from .runs import pack

FORMS = ["tar", "tar per class", "tar of tars", "zip", "zip with a folder"]


@pytest.mark.parametrize("form", [*FORMS, "zip with a map"])
def test_archives_hold_what_folders_hold(photos: Path, tmp_path: Path, form: str) -> None:
    packed = pack(photos, form, tmp_path)
    for split in ("train", "val"):
        plain = open_split(str(photos), split)
        other = open_split(str(packed), split, zip_mode=form.startswith("zip"))
        assert other.classes == plain.classes == ["0", "1", "2"]
        both = [{(r.label(i), r.read(i)) for i in range(len(r))} for r in (plain, other)]
        assert both[0] == both[1] and len(both[0]) == len(plain) == len(other)


@pytest.mark.parametrize("form", ["tar", "tar per class", "zip"])
def test_class_numbers_do_not_depend_on_the_form(digits: Path, tmp_path: Path, form: str) -> None:
    """With twelve classes, numerical and alphabetical order differ."""
    names = [str(i) for i in range(12)]
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "plain" / split / name).mkdir(parents=True)
            shutil.copy(next((digits / "val" / "3").iterdir()), tmp_path / "plain" / split / name / f"in_{name}.png")
    reader = open_split(str(pack(tmp_path / "plain", form, tmp_path)), "train")
    assert reader.classes == open_split(str(tmp_path / "plain"), "train").classes == sorted(names)
    for i in range(12):
        assert reader.name(i).endswith(f"in_{reader.classes[reader.label(i)]}.png")


@pytest.mark.parametrize("form", ["folders", *FORMS])
def test_hidden_files_are_ignored(photos: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Files that macOS, Jupyter and editors leave behind are counted once and change nothing else."""
    messy = tmp_path / "messy"
    shutil.copytree(photos, messy)
    clutter = [
        ".DS_Store",
        ".ipynb_checkpoints/0.png",
        "0/._x.png",
        "0/.x.png",
        "0/.ipynb_checkpoints/x.png",
        "1/x.txt",
        "@eaDir/0.png",
    ]
    for name in [*clutter, "__MACOSX/0/._x.png"]:
        path = messy / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")
    assert [path.name for path in find_images([messy / "train" / "0"])] == [
        path.name for path in sorted((photos / "train" / "0").iterdir())
    ]
    clean = open_split(str(photos), "train")
    with caplog.at_level("WARNING", logger="spatial_mamba"):
        reader = open_split(str(messy if form == "folders" else pack(messy, form, tmp_path)), "train")
    assert reader.classes == clean.classes
    assert {(reader.label(i), reader.read(i)) for i in range(len(reader))} == {
        (clean.label(i), clean.read(i)) for i in range(len(clean))
    }
    assert len(reader) == len(clean)
    (message,) = {record.getMessage() for record in caplog.records}
    count = int(re.search(r"ignored (\d+) files", message)[1])
    assert count == (4 if form == "tar per class" else 8), message  # hidden tars in a folder are not opened


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("0/self", "."),
        ("0/up", "../.."),
        ("0/top", "../../.."),
        ("again", "."),
        ("circle", "circle"),
        ("1/back", "{root}"),
    ],
)
def test_links_are_followed_except_to_parent_folders(photos: Path, tmp_path: Path, link: str, target: str) -> None:
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    shutil.move(root / "train" / "1", tmp_path / "elsewhere")
    (root / "train" / "1").symlink_to(tmp_path / "elsewhere")
    (root / "train" / link).symlink_to(target.format(root=root))
    linked, plain = (open_split(str(folder), "train") for folder in (root, photos))
    assert (linked.classes, linked.samples) == (plain.classes, plain.samples)


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_broken_links_are_ignored_and_empty_classes_are_an_error(
    photos: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    image = next((root / "train" / "0").iterdir())
    (root / "train/0/broken.png").symlink_to("absent.png")
    (root / "train/0/itself.png").symlink_to("itself.png")
    (root / "train/2/link.png").symlink_to(f"../0/{image.name}")

    def opened() -> Any:
        if form == "folders":
            return open_split(str(root), "train")
        (tmp_path / "packed").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "packed/train.tar", "w") as archive:
            archive.add(root / "train", ".")
        return open_split(str(tmp_path / "packed"), "train")

    with caplog.at_level("WARNING", logger="spatial_mamba"):
        reader = opened()
    assert "ignored 2 files" in caplog.text
    found = {reader.name(i)[-10:]: reader.read(i) for i in range(len(reader))}
    assert found["2/link.png"] == image.read_bytes()
    assert len(found) == len(open_split(str(photos), "train")) + 1
    (root / "train/aaa").mkdir()
    with pytest.raises(UserError, match="class folder aaa holds no image; fill or remove it"):
        opened()


def test_class_lists_of_every_encoding(photos: Path, tmp_path: Path) -> None:
    packed = pack(photos, "zip", tmp_path)
    members = [f"{cls}/{next((photos / 'train' / cls).iterdir()).name}" for cls in "012"]
    with zipfile.ZipFile(packed / "train.zip", "a") as archive:
        archive.writestr("0/.listed.png", b"")

    def read(text: bytes, split: str = "train") -> Any:
        (packed / f"{split}_map.txt").write_bytes(text)
        return open_split(str(packed), split, zip_mode=True)

    lines = [f"{member}\t{label}" for label, member in enumerate([*members, "0/.listed.png"])]
    plain = "\n".join(lines)
    for text in (plain, "\ufeff" + plain + "\n\n", plain.replace("\n", "\r\n") + "\r\n \r\n"):
        reader = read(text.encode())
        assert [reader.samples, reader.classes] == [
            [(line.split("\t")[0], label) for label, line in enumerate(lines)],
            ["0", "1", "2", "3"],
        ]
    for text, message in (
        (plain.encode("utf-16"), "train_map.txt, line 1: not UTF-8 text"),
        (f"{lines[0]}\nf\xe4.png\t1".encode("latin-1"), "train_map.txt, line 2: not UTF-8 text"),
        (f"{lines[0]}\n\n{members[1]}\t7".encode(), "train_map.txt, line 3: class 7, but no line has class 1"),
        (f"{lines[0]}\n{members[1]}\t9999999".encode(), "train_map.txt, line 2: expected a member name"),
    ):
        with pytest.raises(UserError, match=message):
            read(text)
    shutil.copy(packed / "train.zip", packed / "val.zip")
    assert len(read(f"{members[0]}\t5".encode(), "val").classes) == 6, "a part of the classes is enough to evaluate"


def test_cached_images_need_no_files(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    cached = CachedReader(open_split(str(copy), "val"), indices=range(0, 15, 2))
    shutil.rmtree(copy)
    plain = open_split(str(photos), "val")
    assert all(cached.read(i) == plain.read(i) and cached.label(i) == plain.label(i) for i in range(0, 15, 2))
    with pytest.raises(OSError):
        cached.read(1)
