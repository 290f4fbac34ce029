"""Find the images of a split in class folders, tar or zip archives, and read their encoded bytes."""

import itertools
import logging
import os
import posixpath
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from ..kernels.errors import UserError
from .models.image_files import IMAGE_ENDINGS, is_hidden

MAX_BYTES = 2**28  # of an encoded image; a small archive can hold much more

_DANGLING = " (a broken link)"

logger = logging.getLogger(__name__)


class Reader(ABC):
    """A split of a data set: numbered images, each with a class.

    Attributes:
        path: of the folder or archive.
        classes: their names.
        has_names: False if ``classes`` are only the numbers of a list.
        samples: for each image the name of its file or archive member, relative to ``path``, and its class number.
    """

    path: Path
    classes: list[str]
    has_names = True
    samples: list[tuple[str, int]]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def label(self, index: int) -> int:
        """Class number of an image."""
        return self.samples[index][1]

    def name(self, index: int) -> str:
        """Name of an image's file or archive member, for messages."""
        return f"{self.path}/{self.samples[index][0]}"

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image; raises exceptions of many kinds if it cannot be read."""


def open_split(data_path: str, split: str, zip_mode: bool = False) -> Reader:
    """Open ``data_path/split``: class folders, a folder of per-class tars, ``split.tar`` or ``split.zip``.

    Hidden names, folders such as ``__MACOSX``, broken links, and files that are not images or not in a class folder are
    ignored in all forms, and counted in one line of the log.

    Args:
        data_path: folder of the data set.
        split: ``train`` or ``val``.
        zip_mode: read ``split.zip`` even if there are other forms. The classes come from ``split_map.txt`` next to it
            (lines of ``member<TAB>class number``) if there is one, else from the folders in the archive.

    Raises:
        UserError: naming the path that is missing, empty or inconsistent.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    folder, tar, archive = root / split, root / f"{split}.tar", root / f"{split}.zip"
    if zip_mode and not archive.is_file():
        raise UserError(f"--zip: {archive} is missing")
    if folder.is_dir() and not zip_mode:
        has_folders = any(entry.is_dir() and not is_hidden(entry.name) for entry in folder.iterdir())
        return FolderReader(folder) if has_folders or not _tar_files(folder) else TarReader(folder)
    if tar.is_file() and not zip_mode:
        return TarReader(tar)
    if archive.is_file():
        return ZipReader(archive, root / f"{split}_map.txt", split == "train")
    raise UserError(f"{data_path}: the {split} split is missing; expected {split}/, {split}.tar or {split}.zip in it")


class FolderReader(Reader):
    """``root/class/**/image``: the layout of ImageNet."""

    def __init__(self, root: Path) -> None:
        try:
            folders, files = _walk(root)
        except OSError as error:
            raise UserError(f"{root}: cannot be listed ({error})") from error
        members = ((name.partition("/")[0] if "/" in name else "", name) for name in files)
        self.path = root
        self.classes, self.samples = _label_members(members, folders, root)

    def read(self, index: int) -> bytes:
        path = self.path / self.samples[index][0]
        _check_size(path.stat().st_size)
        return path.read_bytes()


class ZipReader(Reader):
    """Images in one zip archive, opened once per process because forked processes cannot share a handle."""

    def __init__(self, path: Path, map_file: Path, needs_all_classes: bool = True) -> None:
        self.path = path
        self.has_names = not map_file.is_file()
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                names = list(dict.fromkeys(archive.namelist()))  # an update repeats the name
        except Exception as error:  # damaged archives raise many types
            raise UserError(f"{path}: not a readable zip archive ({error})") from error
        if not self.has_names:
            self.classes, self.samples = _read_map(map_file, set(names), path, needs_all_classes)
        else:
            # Many zip tools add a folder around all others: it is not a class.
            images = [name for name in names if "/" in name and _is_image(name)]
            top = {name.partition("/")[0] for name in images}
            prefix = f"{top.pop()}/" if len(top) == 1 and any(name.count("/") > 1 for name in images) else ""
            inner = [(name, name.removeprefix(prefix).split("/")) for name in names]
            folders = {parts[0] for name, parts in inner if len(parts) > 1 and not is_hidden(name)} - {""}
            members = [(parts[0] if len(parts) > 1 else "", name) for name, parts in inner if parts[-1]]
            self.classes, self.samples = _label_members(members, folders, path)

    def read(self, index: int) -> bytes:
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        name = self.samples[index][0]
        _check_size(self._archive[1].getinfo(name).file_size)
        return self._archive[1].read(name)


class TarReader(Reader):
    """Images in one tar, in tars inside it, or in a folder of one tar per class; the innermost folder is the class."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, first byte and length of each member
        inside: set[str] = set()  # folders, and tars in place of folders
        for archive in [path] if path.is_file() else _tar_files(path):
            prefix = "" if archive == path else f"{archive.name}/"
            try:
                with archive.open("rb") as file:
                    most = archive.stat().st_size // tarfile.BLOCKSIZE  # links to tars could multiply members
                    for count, (name, place) in enumerate(_tar_members(file, prefix), start=1):
                        if count > most:
                            raise tarfile.ReadError("links repeat its members")
                        if place is None:
                            inside.add(name)
                        else:
                            self._places[name] = (archive, *place)
            except Exception as error:  # damaged archives raise all kinds
                raise UserError(f"{archive}: not a readable tar archive ({error})") from error
            inside |= {archive.name} if prefix else set()
        with_images = {posixpath.dirname(name) for name in self._places if _is_image(name)} - {""}
        depths = {folder.count("/") for folder in with_images}
        without = {name for name in inside if name.count("/") in depths and not is_hidden(name)}
        without -= {
            str(place) for folder in with_images for place in (PurePosixPath(folder), *PurePosixPath(folder).parents)
        }
        folders = {_class_of(folder) for folder in with_images | without}
        members = [(_class_of(posixpath.dirname(name)), name) for name in self._places]
        self.classes, self.samples = _label_members(members, folders, path)

    def read(self, index: int) -> bytes:
        archive, first, size = self._places[self.samples[index][0]]
        _check_size(size)
        with archive.open("rb") as file:  # no open archives: forked workers would share their file position
            file.seek(first)
            return file.read(size)


class CachedReader(Reader):
    """Keeps the encoded bytes of the images ``indices`` in memory; forked workers share them."""

    def __init__(self, reader: Reader, indices: Iterable[int]) -> None:
        self._reader = reader
        self.path, self.classes, self.samples = reader.path, reader.classes, reader.samples
        self.has_names = reader.has_names
        self._cache = {}
        for index in indices:
            try:
                self._cache[index] = reader.read(index)
            except Exception:
                continue  # it is read again when needed, and then reported or skipped

    def read(self, index: int) -> bytes:
        return self._cache[index] if index in self._cache else self._reader.read(index)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_BYTES:,}")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Folders in ``root`` and all files below it, relative to it. Links are followed, except to a folder above.

    Raises:
        OSError: for a folder that cannot be listed.
    """
    folders: list[str] = []
    files: list[str] = []

    def visit(folder: Path, prefix: str, above: set[Path]) -> None:
        """``above``: the real paths of this folder and all above it."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink() and not Path(entry.path).exists():
                    files.append(name + _DANGLING)
                elif not entry.is_dir():
                    files.append(name if entry.is_file() else f"{name} (not a file)")
                elif entry.is_symlink() and Path(entry.path).resolve() in above:
                    logger.warning("%s: ignored, a link to a folder above it", entry.path)
                else:
                    if not prefix and not is_hidden(name):
                        folders.append(name)
                    path = Path(entry.path)
                    visit(path, f"{name}/", above | (_with_parents(path) if entry.is_symlink() else {path.resolve()}))

    visit(root, "", _with_parents(root))
    return folders, files


def _with_parents(folder: Path) -> set[Path]:
    real = folder.resolve()
    return {real, *real.parents}


def _tar_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def _class_of(folder: str) -> str:
    name = posixpath.basename(folder)
    return name[:-4] if name.lower().endswith(".tar") else name


def _tar_members(file: IO[bytes], prefix: str, start: int = 0) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Path, and (first byte, length), of the members of a tar file and of the tars in it, which count as folders.

    Folders have None. Links have the place of their target.
    """
    with tarfile.open(fileobj=_ShortReads(file), mode="r:") as archive:  # type: ignore[call-overload]
        members = {posixpath.normpath(member.name): member for member in archive}
        members.pop(".", None)
        for path, member in members.items():
            name = prefix + path
            if member.isdir():
                yield name, None
                continue
            target = _target(member, members)
            if target is None:
                yield name + _DANGLING, (0, 0)
                continue
            member = target
            if member.isfile() and name.lower().endswith(".tar") and not is_hidden(name):
                yield name, None
                inner = archive.extractfile(member)
                assert inner is not None  # it is a regular file
                yield from _tar_members(inner, f"{name}/", start + member.offset_data)
            else:
                yield name, (start + member.offset_data, member.size)


class _ShortReads:
    """A file that reads at most 1 MiB at once, because headers of a damaged tar file can ask for any amount."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.seekable, self.tell = file, file.seek, file.seekable, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, 2**20))


def _target(member: tarfile.TarInfo, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The target of a link in a tar file, any other member itself; None for a broken link."""
    seen = set()
    while member.issym() or member.islnk():
        folder = posixpath.dirname(member.name) if member.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, member.linkname))
        if name in seen or name not in members:
            return None
        seen.add(name)
        member = members[name]
    return member


def _label_members(
    members: Iterable[tuple[str, str]], folders: Iterable[str], source: Path
) -> tuple[list[str], list[tuple[str, int]]]:
    """Number the classes in alphabetical order; every class folder must hold an image.

    Args:
        members: class and path of every file; the class is empty for a file in no class folder.
        folders: names of all classes.
    """
    classes = sorted(folders)
    number = {name: i for i, name in enumerate(classes)}
    samples, ignored = [], []
    for cls, name in members:
        if cls and _is_image(name):
            samples.append((name, number[cls]))
        else:
            ignored.append(name)
    if not samples:
        raise UserError(f"{source}: found no images in class folders ({', '.join(IMAGE_ENDINGS)})")
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        raise UserError(f"{source}: class folder {classes[empty[0]]} holds no image; fill or remove it")
    if ignored:
        logger.warning(
            "%s: ignored %d files that are hidden, not images or not in a class folder, such as %s",
            source, len(ignored), min(ignored),
        )  # fmt: skip
    return classes, sorted(samples)


def _read_map(
    map_file: Path, names: set[str], archive: Path, needs_all_classes: bool
) -> tuple[list[str], list[tuple[str, int]]]:
    """The class numbers of a list, as strings, and its images in their order."""
    content = map_file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{map_file}, line {number}: not UTF-8 text; save the file in that encoding") from error
    samples: list[tuple[str, int]] = []
    line_of: dict[int, int] = {}  # first line of each class
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().partition("\t")
        if not (label.isascii() and label.isdigit() and len(label) <= 6):
            raise UserError(f"{map_file}, line {number}: expected a member name, a tab and a class number")
        if name not in names:
            raise UserError(f"{map_file}, line {number}: {archive} has no member {name}")
        samples.append((name, int(label)))
        line_of.setdefault(int(label), number)
    if not samples:
        raise UserError(f"{map_file}: lists no images")
    largest = max(line_of)
    missing = next(label for label in itertools.count() if label not in line_of)
    if needs_all_classes and missing < largest:
        raise UserError(
            f"{map_file}, line {line_of[largest]}: class {largest}, but no line has class {missing}; "
            "number the classes from 0 on, without gaps"
        )
    return [str(label) for label in range(largest + 1)], samples
