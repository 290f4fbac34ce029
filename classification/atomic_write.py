"""Atomic writes, and locks on files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; once it is on the disk it takes the place of ``path``.

    An exception removes it, and what was at ``path`` before is kept.
    """
    unfinished = path.with_name(f".{path.name}.unfinished{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def lock(file: IO) -> None:
    """Lock an open file for this process, without waiting; the lock goes with the process.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(str(error)) from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
