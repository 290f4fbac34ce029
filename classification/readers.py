"""Finds the images of a split in class folders, tar or zip archives, and reads their encoded bytes."""

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import InputError

# A missing or damaged file or archive member, or one packed in a way that cannot be undone here.
READ_ERRORS = (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, tarfile.TarError)


class Reader(Protocol):
    """A split of a data set: numbered images, each with a class."""

    classes: list[str]

    def __len__(self) -> int:
        """Number of images."""

    def label(self, index: int) -> int:
        """Class number of an image."""

    def name(self, index: int) -> str:
        """Where the image is, for people."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises one of ``READ_ERRORS`` if it cannot be read."""


def open_split(data_path: str, split: str, zip_mode: bool = False) -> Reader:
    """Open ``data_path/split``: class folders, a folder of per-class tars, ``split.tar`` or ``split.zip``.

    Args:
        data_path: folder of the data set.
        split: ``train`` or ``val``.
        zip_mode: take ``split.zip`` even where other forms are there too. With a ``split_map.txt`` beside it
            (lines of ``member<TAB>class number``) that list is followed, else the class folders in the archive.

    Raises:
        InputError: naming the path that is missing, empty or inconsistent.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise InputError(f"--data-path {data_path}: no such folder")
    folder, tar, archive = root / split, root / f"{split}.tar", root / f"{split}.zip"
    if zip_mode:
        if not archive.is_file():
            raise InputError(f"--zip: {archive} is missing")
        return ZipReader(archive, root / f"{split}_map.txt")
    if folder.is_dir():
        has_folders = any(entry.is_dir() for entry in folder.iterdir())
        return FolderReader(folder) if has_folders or not any(folder.glob("*.tar")) else TarReader(folder)
    if tar.is_file():
        return TarReader(tar)
    if archive.is_file():
        return ZipReader(archive, root / f"{split}_map.txt")
    raise InputError(f"{data_path}: the {split} split is missing; expected {split}/, {split}.tar or {split}.zip in it")


class FolderReader:
    """``root/class/**/image``: the layout of ImageNet."""

    def __init__(self, root: Path) -> None:
        folders = [entry.name for entry in root.iterdir() if entry.is_dir()]
        members = ((name, path.relative_to(root).as_posix()) for name in folders for path in _walk(root / name))
        self.root = root
        self.classes, self.samples = _label_members(members, folders, root)

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> int:
        return self.samples[index][1]

    def name(self, index: int) -> str:
        return str(self.root / self.samples[index][0])

    def read(self, index: int) -> bytes:
        return (self.root / self.samples[index][0]).read_bytes()


class ZipReader:
    """Images in one zip archive, opened once per process because file handles do not survive a fork."""

    def __init__(self, path: Path, map_file: Path) -> None:
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not _is_mac_metadata(name)]
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a readable zip archive ({error})") from error
        if map_file.is_file():
            self.classes, self.samples = _read_map(map_file, set(names), path)
        else:
            # One folder around all classes, as zip tools like to add, is no class.
            top = {name.split("/")[0] for name in names}
            prefix = f"{top.pop()}/" if len(top) == 1 else ""
            inner = [(name, name.removeprefix(prefix).split("/")) for name in names]
            folders = {parts[0] for name, parts in inner if len(parts) > 1 and parts[0]}
            members = [(parts[0], name) for name, parts in inner if len(parts) > 1 and parts[-1]]
            self.classes, self.samples = _label_members(members, folders, path)

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> int:
        return self.samples[index][1]

    def name(self, index: int) -> str:
        return f"{self.path}/{self.samples[index][0]}"

    def read(self, index: int) -> bytes:
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1].read(self.samples[index][0])


class TarReader:
    """Images in one tar or in a folder of one tar per class, through timm's reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        timm_extensions = get_img_extensions()
        set_img_extensions(IMG_EXTENSIONS)  # timm's list is shorter, and would pass over the others silently
        try:
            # No index file, which would lie in the data set and go stale, and no open archives: forked
            # workers would share their file position.
            self._reader = ReaderImageInTar(str(path), cache_tarinfo=False, cache_tarfiles=False)
        except Exception as error:  # tarfile raises many types; timm unpacks an empty list when there is no image
            raise InputError(f"{path}: found no readable images in tar form ({error})") from error
        finally:
            set_img_extensions(timm_extensions)
        # timm counts 2 before 10; a class must have the same number in every form of a data set.
        self.classes = sorted(self._reader.class_name_to_idx)
        number = {self._reader.class_name_to_idx[name]: i for i, name in enumerate(self.classes)}
        self._labels = [number[int(target)] for target in self._reader.targets]

    def __len__(self) -> int:
        return len(self._reader)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        _, archive, _ = self._reader.samples[index]
        return "/".join(str(part) for part in (self.path, archive, self._reader.filename(index)) if part)

    def read(self, index: int) -> bytes:
        stream, _ = self._reader[index]
        with stream:
            return stream.read()


class CachedReader:
    """Keeps the encoded bytes of the images named by ``indices`` in memory; worker processes share them by fork."""

    def __init__(self, reader: Reader, indices: Iterable[int]) -> None:
        self._reader = reader
        self.classes = reader.classes
        self._cache = {}
        for index in indices:
            try:
                self._cache[index] = reader.read(index)
            except READ_ERRORS:
                continue  # read again, and reported or skipped, when its turn comes

    def __len__(self) -> int:
        return len(self._reader)

    def label(self, index: int) -> int:
        return self._reader.label(index)

    def name(self, index: int) -> str:
        return self._reader.name(index)

    def read(self, index: int) -> bytes:
        return self._cache[index] if index in self._cache else self._reader.read(index)


def _is_mac_metadata(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.split("/")[-1].startswith("._")


def _walk(folder: Path) -> Iterable[Path]:
    for parent, _, files in os.walk(folder, followlinks=True):
        yield from (Path(parent, file) for file in files)


def _label_members(
    members: Iterable[tuple[str, str]], folders: Iterable[str], source: Path
) -> tuple[list[str], list[tuple[str, int]]]:
    """Number the classes in alphabetical order; every class folder must hold an image."""
    classes = sorted(folders)
    number = {name: i for i, name in enumerate(classes)}
    samples = sorted((name, number[cls]) for cls, name in members if name.lower().endswith(IMG_EXTENSIONS))
    if not samples:
        raise InputError(f"{source}: found no images in class folders ({', '.join(IMG_EXTENSIONS)})")
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        raise InputError(f"{source}: class folder {classes[empty[0]]} holds no image; fill or remove it")
    return classes, samples


def _read_map(map_file: Path, names: set[str], archive: Path) -> tuple[list[str], list[tuple[str, int]]]:
    samples = []
    for number, line in enumerate(io.StringIO(map_file.read_text(encoding="utf-8")), start=1):
        name, _, label = line.strip().partition("\t")
        if not label.isdigit():
            raise InputError(f"{map_file}, line {number}: expected a member name, a tab and a class number")
        if name not in names:
            raise InputError(f"{map_file}, line {number}: {archive} has no member {name}")
        samples.append((name, int(label)))
    if not samples:
        raise InputError(f"{map_file}: lists no images")
    return [str(i) for i in range(max(label for _, label in samples) + 1)], samples
