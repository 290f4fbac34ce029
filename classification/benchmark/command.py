"""What the measuring commands share: options with one-line errors, tables, and the files they write."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels.benchmark import measure, report
from ...kernels.benchmark.options import OneLineParser, user_path, whole_number

VARIANTS = ("tiny", "small", "base")


class Parser(OneLineParser):
    """Options that all the commands take.

    Args:
        name: of the module, and of the files that the command writes.
        description: for --help.
        takes_threads: whether the number of threads is the user's to choose.
    """

    def __init__(self, name: str, description: str | None, takes_threads: bool = True) -> None:
        super().__init__(prog=f"python -m spatial_mamba.classification.benchmark.{name}", description=description)
        self.name = name
        self.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is a GPU")
        if takes_threads:
            self.add_argument("--threads", type=whole_number, help="of PyTorch on the CPU")
        self.add_argument("--out", type=user_path, default=Path("output/benchmark"), metavar="FOLDER")
        self.add_argument("--markdown", action="store_true", help="tables in Markdown")


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

    A folder that cannot be written ends the command, before anything is measured.
    """

    def __init__(self, parser: Parser, args: argparse.Namespace, device: torch.device) -> None:
        self.folder, self.name, self.in_markdown = args.out, parser.name, args.markdown
        parser.folder(self.folder)
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


def prepare(device: torch.device, threads: int | None) -> bool:
    """Set the number of threads, if any is given, and make ready for timing; whether freed memory is kept.

    On a GPU the fastest convolutions are chosen; on a CPU freed memory is kept as on a GPU, if the C library can.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return device.type == "cpu" and measure.keep_freed_memory()


def timing_record(timing: measure.Timing) -> Mapping[str, float]:
    """Seconds for JSON: the median and the quartiles."""
    return {"seconds": timing.median, "lower": timing.lower, "upper": timing.upper, "rounds": timing.rounds}


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others])
