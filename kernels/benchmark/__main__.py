"""Time the operators: every backend that can run here, compared with PyTorch and the baseline.

The baseline is the published formulation, written in PyTorch. Prints a table per case, and writes operators.json.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from .. import backends
from ..command_line import run_command, whole_number
from . import measure
from .cases import Case, all_cases, gradient_like
from .implementations import COMPILED, OPERATORS, REFERENCE, Check, Implementation, implementations, why_not
from .report import BATCHES, DTYPES, NOTE, PEAK, TIMES, Column, Parser, Report, matching

COLUMNS = (
    Column("", "name"),
    Column("backend", "backend"),
    *TIMES,
    Column("x reference", "times_reference", ".2f"),
    Column("of memory copy", "fraction_of_copy", ".1%"),
    PEAK,
    Column("error", "error", ".1e"),
    Column("in", "error_in"),
    NOTE,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0, 1 if an implementation failed, or 2 for wrong options."""
    return run_command(_benchmark, argv)


def _parser() -> Parser:
    example = "--cases 'core/tiny/*' --dtype float32 bfloat16"
    parser = Parser("spatial-mamba benchmark operators", __doc__, example, seconds=5.0, of="case, dtype and mode")
    add = parser.add_argument
    add("--cases", nargs="+", metavar="GLOB", default=["*"], help="e.g. 'core/tiny/*' (default: all)")
    text = f"backends, {COMPILED}, 'baseline*', library (default: all except {COMPILED}, which takes minutes)"
    add("--implementations", nargs="+", metavar="GLOB", help=text)
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the activations")
    add("--batch", type=whole_number, help="images of 224x224 (default: 8 on a CPU, 128 on a GPU)")
    return parser


def _benchmark(argv: Sequence[str] | None) -> int:
    start, args = time.perf_counter(), _parser().parse_args(argv)
    cases = {case.name: case for case in all_cases(args.batch or BATCHES[args.device])}
    chosen = [cases[name] for name in matching("--cases", args.cases, list(cases))]
    report = Report("operators", args)
    for name, dtype in itertools.product(backends.BACKENDS, args.dtype):
        if reason := why_not(name, report.device, getattr(torch, dtype)):
            print(f"{name} is not timed in {dtype}: {reason}")
    settings = list(itertools.product(chosen, args.dtype))
    found = [implementations(case, report.device, getattr(torch, dtype)) for case, dtype in settings]
    names = list(dict.fromkeys(implementation.name for several in found for implementation in several))
    wanted = matching("--implementations", args.implementations or [name for name in names if name != COMPILED], names)
    trial = measure.Trial(report.device, measure.operator_clock(report.device), args.seconds, start + args.limit)
    for (case, dtype), several in zip(settings, found, strict=True):
        if trial.is_late():
            report.record["skipped"].append(f"{case.name} {dtype}")
        elif several := [implementation for implementation in several if implementation.name in wanted]:
            _measure(trial, case, dtype, several, report)
        torch.compiler.reset()  # graphs compiled for this shape
    return report.finish()


def _measure(trial: measure.Trial, case: Case, dtype: str, found: Sequence[Implementation], report: Report) -> None:
    """Add a table per mode to the report."""
    # Large cases are checked on fewer images or channels, but at full image size.
    check = Check(case.cropped(), trial.device, getattr(torch, dtype))
    inputs = case.inputs(trial.device, getattr(torch, dtype))
    output, _ = measure.dry_run(OPERATORS[case.operator], **inputs)
    bandwidth = measure.copy_bandwidth(trial.clock, trial.device)
    for mode, gradient in {"forward": None, "forward+backward": gradient_like(output)}.items():
        rows = trial.run((each.name, partial(_make, each, check, inputs, gradient)) for each in found)
        size = measure.compulsory_bytes(inputs.values(), output, None if gradient is None else inputs.values())
        reference = next((row.get("seconds") for row in rows if row["name"] == REFERENCE), None)
        for row in rows:
            if "seconds" in row:
                row["times_reference"] = reference and reference / row["seconds"]
                row["fraction_of_copy"] = size / row["seconds"] / bandwidth
        title = (
            f"{case.name}, {dtype}, {mode}: batch {case.batch}, {case.height}x{case.width} tokens, dim {case.dim}, "
            f"R {case.rank}, N {case.d_state}; {size / 1e6:.1f} MB compulsory; memory copy {bandwidth / 1e9:.1f} GB/s"
        )
        report.add(title, COLUMNS, rows, **asdict(case), dtype=dtype, mode=mode, bytes=size, bandwidth=bandwidth)


def _make(
    implementation: Implementation, check: Check, inputs: dict[str, Tensor], gradient: Tensor | None, row: measure.Row
) -> measure.Call:
    row["backend"] = implementation.backend
    row["error"], row["error_in"] = check.worst(implementation, backward=gradient is not None)
    return implementation.bind(inputs, gradient)


if __name__ == "__main__":
    sys.exit(main())
