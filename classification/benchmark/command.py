"""What the measuring commands share: options with one-line errors, tables, and the files they write."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from ...kernels.benchmark import measure, report
from ...kernels.benchmark.options import OneLineParser, whole_number
from ..config import load_config
from ..errors import InputError

VARIANTS = ("tiny", "small", "base")


class Parser(OneLineParser):
    """Options that all the commands take.

    Args:
        name: of the module, and of the files that the command writes.
        description: for --help.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(prog=f"python -m spatial_mamba.classification.benchmark.{name}", description=description)
        self.name = name
        self.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is a GPU")
        self.add_argument("--threads", type=whole_number, help="of PyTorch on the CPU")
        self.add_argument("--out", type=Path, default=Path("output/benchmark"), metavar="FOLDER")
        self.add_argument("--markdown", action="store_true", help="tables in Markdown")


def positive(text: str) -> float:
    """A finite number above 0, as argparse's types are written."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def image_size(text: str) -> int:
    """A side of at least 32 pixels, the stride of the model."""
    size = whole_number(text)
    if size < 32:
        raise argparse.ArgumentTypeError(f"must be at least 32 pixels, got {size}")
    return size


def variant_config(variant: str, overrides: Sequence[tuple[str, Any]] = ()) -> CfgNode:
    """The trainer's config of a variant."""
    return load_config(f"spatialmamba_{variant}", overrides)[0]


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, rows of texts, the first column left-aligned, and lines that follow them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [_padded(row, widths) for row in (self.columns, *self.rows)]
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in [*lines, *self.notes])])

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([self.title, "", *lines, *(f"\n{note}" for note in self.notes)])


class Report:
    """Prints what is measured as it comes, and keeps it in ``NAME.json`` and ``NAME.txt`` (or ``.md``).

    Raises:
        InputError: if the folder cannot be written; found before anything is measured.
    """

    def __init__(self, parser: Parser, args: argparse.Namespace, device: torch.device) -> None:
        self.folder, self.name, self.in_markdown = args.out, parser.name, args.markdown
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder}: cannot be written ({error.strerror})") from error
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        del options["out"], options["markdown"]
        self.record: dict[str, Any] = {"options": options, "environment": report.environment(device)}
        self._texts: list[str] = []
        self.say("; ".join(f"{name} {value}" for name, value in self.record["environment"].items()))

    def say(self, text: str) -> None:
        """Print a paragraph and keep it."""
        print(text, end="\n\n", flush=True)
        self._texts.append(text)

    def table(self, table: Table) -> None:
        """Print a table and keep it; what has been found so far is written."""
        self.say(table.markdown() if self.in_markdown else table.text())
        self.write()

    def write(self) -> None:
        """Write the files."""
        text = "\n\n".join(self._texts) + "\n"
        (self.folder / f"{self.name}.{'md' if self.in_markdown else 'txt'}").write_text(text)
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.record, indent=1) + "\n")


def prepare_threads(args: argparse.Namespace, device: torch.device) -> bool:
    """Set the number of threads, and keep freed memory as GPUs do; whether the C library could."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return device.type == "cpu" and measure.keep_freed_memory()


def timing_record(timing: measure.Timing) -> Mapping[str, float]:
    """Seconds for JSON: the median and the quartiles."""
    return {"seconds": timing.median, "lower": timing.lower, "upper": timing.upper, "rounds": timing.rounds}


def failure_text(failure: Exception) -> str:
    """The type and the first line of an exception."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others])
