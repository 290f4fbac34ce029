"""Shared by the benchmarks: options, tables, and the results file."""

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import command_line
from ..errors import UserError
from .measure import Row, keep_freed_memory

DTYPES = ("float32", "bfloat16", "float16")
BATCHES = {"cpu": 8, "cuda": 128}  # default numbers of images


class Column(NamedTuple):
    """A column of a table: ``row[key] * factor``, formatted with ``style``; columns without a style hold text."""

    title: str
    key: str
    style: str = ""
    factor: float = 1

    def cell(self, row: Row) -> str:
        """The text for a row; a dash stands for a missing value."""
        value = row.get(self.key)
        if value is None:
            return "" if self.key == "note" else "-"
        return f"{value * self.factor:{self.style}}" if self.style else str(value)


TIMES = (Column("ms", "seconds", ".4g", 1e3), Column("25%", "lower", ".4g", 1e3), Column("75%", "upper", ".4g", 1e3))
PEAK = Column("peak MB", "peak_bytes", ".1f", 1e-6)
NOTE = Column("note", "note")


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table in Markdown, aligned for reading in a terminal."""
    lines = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(2, *map(len, cells)) for cells in zip(*lines, strict=True)]
    rules = ["-" * (width - 1) + (":" if column.style else "-") for column, width in zip(columns, widths, strict=True)]
    styles = [f"{'>' if column.style else '<'}{width}" for column, width in zip(columns, widths, strict=True)]
    lines.insert(1, rules)
    return "\n".join([title, "", *(f"| {' | '.join(map(format, cells, styles))} |" for cells in lines)])


class Parser(command_line.Parser):
    """The options of all benchmarks.

    Args:
        command, description, example: as for ``command_line.Parser``.
        seconds: default of ``--seconds``.
        of: what ``--seconds`` applies to, for ``--help``.
    """

    def __init__(self, command: str, description: str | None, example: str, seconds: float, of: str) -> None:
        super().__init__(command, description, example)
        add, device = self.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
        add("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
        add("--threads", type=command_line.whole_number, help="number of PyTorch's CPU threads")
        add("--seconds", type=command_line.seconds, default=seconds, help=f"of timing per {of} (default: %(default)s)")
        add("--limit", type=command_line.seconds, default=math.inf, metavar="SECONDS", help="start nothing after this")
        add("--out", type=Path, default=Path("output/benchmark"), help="folder for the results (default: %(default)s)")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; ``command_line`` is what the user typed."""
        command = shlex.join([*self.prog.split(), *(sys.argv[1:] if args is None else args)])
        return argparse.Namespace(command_line=command, **vars(super().parse_args(args)))


def matching(option: str, globs: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match any of the globs, each once, in the order of the globs.

    Raises:
        UserError: for a glob that matches no name.
    """
    found: dict[str, None] = {}
    for glob in globs:
        if not (matched := [name for name in names if fnmatchcase(name, glob)]):
            raise UserError(f"{option}: {glob!r} matches none of {', '.join(names)}")
        found |= dict.fromkeys(matched)
    return list(found)


class Report:
    """Prints results as tables and writes them to ``NAME.json``.

    The file holds the command, the environment, what was skipped, and ``results``: settings and rows, one per table.
    The constructor also prepares the process for timing.

    Args:
        args: the options, from ``Parser``.
        keep_freed: as for ``prepare``.

    Raises:
        UserError: if there is no GPU to use, or the folder cannot be written.
    """

    def __init__(self, name: str, args: argparse.Namespace, keep_freed: bool = True) -> None:
        self.device, self.path = torch.device(args.device), args.out / f"{name}.json"
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no usable GPU; use --device cpu")
        prepare(self.device, args.threads, keep_freed)
        self.record: dict[str, Any] = {"command": args.command_line, "environment": environment(self.device)}
        self.record |= {"skipped": [], "results": []}
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from error
        print(args.command_line, *(f"{key}: {value}" for key, value in self.record["environment"].items()), sep="\n")

    def add(self, title: str, columns: Sequence[Column], rows: Sequence[Row], **setting: Any) -> None:
        """Print the rows as a table, and write all results so far."""
        self.record["results"].append({**setting, "rows": list(rows)})
        print(f"\n{table(title, columns, rows)}", flush=True)
        self._write()

    def finish(self) -> int:
        """Report what is missing and where the results are; returns the exit status: 1 if anything failed, else 0."""
        self._write()
        rows = [row for result in self.record["results"] for row in result["rows"]]
        failed, not_run = (sum(key in row for row in rows) for key in ("failure", "not_run"))
        print("", *(f"skipped, out of time: {case}" for case in self.record["skipped"]), sep="\n")
        print(f"results: {self.path}; failed: {failed}; not run: {not_run + len(self.record['skipped'])}")
        return int(failed > 0)

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


def prepare(device: torch.device, threads: int | None, keep_freed: bool = True) -> None:
    """Set the number of threads, keep freed memory on a CPU, and let cuDNN choose the fastest convolutions."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    if device.type == "cpu" and keep_freed:
        keep_freed_memory()


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo")  # Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    facts = {"cpu": cpu, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts | {"python": platform.python_version(), "torch": torch.__version__}
