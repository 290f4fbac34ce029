"""The records of a run: console, log file, TensorBoard scalars, one JSON line per epoch, progress bars."""

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..kernels.command_line import printable
from .atomic_write import atomic_write
from .distributed import Process

METRICS = "metrics.jsonl"  # one line per epoch

logger = logging.getLogger(__name__)
_PACKAGE_LOGGER = logging.getLogger("spatial_mamba")


class RunLog:
    """Writes on the main process only.

    Args:
        process: this process.
        folder: for the files; None writes to the console only.
        first_update: the next update; scalars that an interrupted run wrote from this update on are dropped.
        first_epoch: the same for the JSON lines.
    """

    def __init__(
        self, process: Process, folder: Path | None = None, first_update: int = 0, first_epoch: int = 0
    ) -> None:
        self._writes = process.is_main
        self._is_terminal = sys.stderr.isatty()
        self._writer = None
        self._metrics = None
        self._failed: set[str] = set()
        if folder is None or not process.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        handler = _FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for earlier in [h for h in _PACKAGE_LOGGER.handlers if isinstance(h, MemoryHandler)]:
            earlier.setTarget(handler)
            earlier.close()  # flushes its records
            _PACKAGE_LOGGER.removeHandler(earlier)
        _PACKAGE_LOGGER.addHandler(handler)
        self._writer = SummaryWriter(str(folder), purge_step=first_update)
        self._metrics = folder / METRICS
        _drop_epochs(self._metrics, first_epoch)

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars are drawn: on the main process, on a terminal."""
        return self._writes and self._is_terminal

    def progress(self, items: Iterable, total: int, title: str) -> tqdm:
        """A progress bar with an ETA on a terminal; otherwise only the items."""
        return tqdm(items, total=total, desc=title, disable=not self.shows_bars, leave=False, dynamic_ncols=True)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Write TensorBoard scalars at an update."""
        with self._warned("TensorBoard"):
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, update)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Append one JSON line; non-finite numbers become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._warned(METRICS):
            if self._metrics:
                with self._metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finite) + "\n")
        with self._warned("TensorBoard"):
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Close the files and detach from the package's logger."""
        with self._warned("TensorBoard"):
            if self._writer:
                self._writer.close()
        _detach_handlers()

    @contextmanager
    def _warned(self, record: str) -> Iterator[None]:
        """Turn failures to write a record into one warning: a run does not end because of them."""
        try:
            yield
        except OSError as error:
            if record not in self._failed:
                logger.warning("%s cannot be written any more (%s); the run continues without it", record, error)
            self._failed.add(record)
            if record == "TensorBoard":
                self._writer = None


def set_up_console(is_main: bool) -> None:
    """Send log records to the console: all records of the main process, errors of the others.

    They are also buffered for the log file, which is opened later.
    """
    _detach_handlers()
    handler = _ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    _PACKAGE_LOGGER.addHandler(handler)
    _PACKAGE_LOGGER.addHandler(MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1))
    _PACKAGE_LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    _PACKAGE_LOGGER.propagate = False


def _detach_handlers() -> None:
    for handler in list(_PACKAGE_LOGGER.handlers):
        _PACKAGE_LOGGER.removeHandler(handler)
        with suppress(OSError):  # a full disk; the console has the records too
            handler.close()


class _FileHandler(logging.FileHandler):
    """Stops after the first failure, such as a full disk, with one line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, of logging
        _PACKAGE_LOGGER.removeHandler(self)
        logger.warning("%s cannot be written any more (%s)", self.baseFilename, sys.exc_info()[1])


class _ConsoleHandler(logging.Handler):
    """Prints through tqdm, so that lines and a progress bar do not overwrite each other."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stdout)
        sys.stdout.flush()


def _drop_epochs(metrics: Path, first_epoch: int) -> None:
    """Drop epochs that will run again, and a line truncated by a crash."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["epoch"] < first_epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    with atomic_write(metrics) as unfinished:
        unfinished.write_text("".join(kept), encoding="utf-8")
