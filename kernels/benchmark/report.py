"""What the commands share: options, the environment, the table printer, and the files that they write."""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .. import options
from ..options import user_path, whole_number
from .measure import Row, keep_freed_memory

DTYPES = ("float32", "bfloat16", "float16")
BATCHES = {"cpu": 8, "cuda": 128}  # images, unless the user chooses


class Column(NamedTuple):
    """A column of a table: its title, the key of the rows that it shows, times a factor, in a style of numbers."""

    title: str
    key: str
    style: str = ""
    factor: float = 1

    def cell(self, row: Row) -> str:
        """The text of a row; a dash where it has no figure."""
        value = row.get(self.key)
        if isinstance(value, int | float):
            return f"{value if self.factor == 1 else self.factor * value:{self.style}}"
        return value or ("" if self.key == "note" else "-")


TIMES = (Column("ms", "seconds", ".4g", 1e3), Column("25%", "lower", ".4g", 1e3), Column("75%", "upper", ".4g", 1e3))
PEAK = Column("peak MB", "peak_bytes", ".1f", 1e-6)
NOTE = Column("note", "note")


def table(title: str, columns: Sequence[Column], rows: Sequence[Row], markdown: bool = False) -> str:
    """A table of text columns, left-aligned, and of figures, right-aligned."""
    cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    left = [not column.style for column in columns]
    if markdown:
        cells.insert(1, ["---" if is_left else "---:" for is_left in left])
        return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in cells)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'<' if is_left else '>'}{width}}" for cell, is_left, width in zip(line, left, widths, strict=True)
        )
        for line in cells
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


class Parser(argparse.ArgumentParser):
    """Options that all commands take; reports a wrong option in one line, without the usage, with status 2.

    Args:
        module: of the command, in this package.
        description: for ``--help``.
        seconds: default of ``--seconds``.
        of: what that is the time for.
    """

    def __init__(self, module: str, description: str | None, seconds: float, of: str) -> None:
        super().__init__(prog=f"python -m spatial_mamba.{module}", description=description)
        add = self.add_argument
        add("--device", choices=("cpu", "cuda"), help="by default cuda where there is a GPU")
        add("--threads", type=whole_number, help="of PyTorch on the CPU")
        add("--seconds", type=options.seconds, default=seconds, help=f"of timing per {of} (default %(default)s)")
        add("--limit", type=options.seconds, default=math.inf, metavar="SECONDS", help="start nothing after that time")
        add("--out", type=user_path, default=Path("output/benchmark"), help="folder for the results")
        add("--markdown", action="store_true", help="tables in Markdown")
        add(
            "--keep-freed-memory",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="on a CPU: do not return freed memory to the system, as on a GPU",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def device(self, name: str | None) -> torch.device:
        """The device of that name; by default the GPU where there is one. It is an error to ask for one in vain."""
        if name == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: PyTorch finds no usable GPU here")
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


class Report:
    """Prints results as they come, and keeps them in ``NAME.json`` and ``NAME.txt`` (or ``.md``).

    The JSON holds the command, the environment, what was skipped, and ``results``: settings and rows, one per table.
    Making it prepares for timing: the number of threads is set, freed memory kept, and on a GPU cuDNN chooses the
    fastest convolutions. A folder that cannot be written ends the command, before anything is measured.
    """

    def __init__(self, name: str, parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
        self.path, self.in_markdown, self.texts = args.out / name, args.markdown, []
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.out):
                pass
        except OSError as error:
            parser.error(f"--out {args.out}: cannot be written: {error.strerror}")
        if args.threads:
            torch.set_num_threads(args.threads)
        device = parser.device(args.device)
        torch.backends.cudnn.benchmark = device.type == "cuda"
        kept = device.type == "cpu" and args.keep_freed_memory and keep_freed_memory()
        command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
        facts = environment(device) | {"freed_memory_kept": kept}
        self.record: dict[str, Any] = {"command": command, "environment": facts, "skipped": [], "results": []}
        self.say(command)
        self.say("; ".join(f"{key} {value}" for key, value in facts.items()))

    def say(self, text: str) -> None:
        """Print a paragraph and keep it."""
        print(text, end="\n\n", flush=True)
        self.texts.append(text)

    def add(self, title: str, columns: Sequence[Column], rows: Sequence[Row], **setting: Any) -> None:
        """Print the rows of a setting as a table, keep both, and write what has been found so far."""
        self.record["results"].append({**setting, "rows": list(rows)})
        self.say(table(title, columns, rows, self.in_markdown))
        self.write()

    def write(self) -> None:
        """Write the files."""
        self.path.with_suffix(".md" if self.in_markdown else ".txt").write_text("\n\n".join(self.texts) + "\n")
        self.path.with_suffix(".json").write_text(json.dumps(self.record, indent=1) + "\n")

    def finish(self) -> int:
        """Say what is missing and where the files are; the exit status, 1 if anything failed."""
        rows = [row for result in self.record["results"] for row in result["rows"]]
        if self.record["skipped"]:
            self.say(f"out of time: {', '.join(self.record['skipped'])}")
        self.write()
        failed, not_run = (sum(key in row for row in rows) for key in ("failure", "not_run"))
        print(f"written to {self.path.parent}; failed: {failed}; not run: {not_run + len(self.record['skipped'])}")
        return int(failed > 0)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
