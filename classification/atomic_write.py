"""Atomic writes and file locks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path``; it replaces ``path`` once it is on the disk.

    An exception removes the temporary file and leaves ``path`` unchanged.
    """
    unfinished = path.with_name(f".{path.name}.unfinished{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(content: Any, path: Path) -> None:
    """``torch.save``, as an atomic write.

    Raises:
        OSError: if the file cannot be written, such as on a full disk.
    """
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the cause, hidden by PyTorch's failure to close the archive
                raise error.__context__ from None
            raise


def lock(file: IO) -> None:
    """Lock a file, opened for writing, for this process, without waiting.

    The lock ends with the process, even if its children, such as loader processes, live on.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(str(error)) from error
    else:
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # POSIX allows this for a lock that is held
            raise BlockingIOError(str(error)) from error
