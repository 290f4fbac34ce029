"""Time the operators of Spatial-Mamba: every backend that is here, compared with the published formulation in PyTorch.

Prints tables, and writes operators.json and operators.txt.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..options import whole_number
from . import implementations, measure
from .cases import Case, all_cases, compulsory_bytes, gradient_like
from .implementations import REFERENCE, Implementation
from .report import BATCHES, DTYPES, NOTE, PEAK, TIMES, Column, Parser, Report

COPY = "memory copy"
MODES = ("forward", "forward+backward")
QUICK_CASES, QUICK_SECONDS = ["*/tiny/stage1/224x224"], 0.5
CPU_REFERENCE_ELEMENTS = 2**23  # a matter of patience
REFERENCE_BYTES = 256  # of memory per element, twice what the float64 reference and its gradients take
COLUMNS = (
    Column("", "name"),
    *TIMES,
    Column("x reference", "times_reference", ".2f"),
    Column("ns/token", "seconds_per_token", ".3g", 1e9),
    Column("GB/s", "bandwidth", ".1f", 1e-9),
    Column("of memory copy", "fraction_of_copy", ".1%"),
    PEAK,
    Column("error", "error", ".1e"),
    Column("in", "error_in"),
    NOTE,
)


def _parser() -> Parser:
    parser = Parser("kernels.benchmark", __doc__, 5.0, "case, dtype and mode")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the activations")
    parser.add_argument("--batch", type=whole_number, help="images of 224x224: by default 8 on a CPU, 128 on a GPU")
    parser.add_argument("--cases", nargs="+", metavar="GLOB", help="e.g. 'core/tiny/*'; by default all")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="by default all that can be used here")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="the baselines too")
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="GLOB",
        help="cases on which torch.compile takes part, a minute each: by default all on a GPU, none on a CPU",
    )
    parser.add_argument("--quick", action="store_true", help="few cases, half a second each")
    return parser


def _cases(args: argparse.Namespace, device: torch.device, parser: Parser) -> list[Case]:
    known = all_cases(args.batch or BATCHES[device.type])
    globs = args.cases or (QUICK_CASES if args.quick else ["*"])
    for glob in globs:
        if not any(fnmatchcase(case.name, glob) for case in known):
            parser.error(f"--cases: {glob!r} matches none of {', '.join(case.name for case in known)}")
    return [case for case in known if any(fnmatchcase(case.name, glob) for glob in globs)]


def _absent(args: argparse.Namespace, device: torch.device, parser: Parser) -> dict[tuple[str, str], str]:
    """By backend and dtype the reason why it cannot be timed; it is an error to ask for such a backend."""
    absent = {}
    for name in args.backends or backends.BACKENDS:
        if name not in backends.BACKENDS:
            parser.error(f"--backends: {name!r} is none of {', '.join(backends.BACKENDS)}")
        for dtype in args.dtype:
            if reason := implementations.why_not(name, device, getattr(torch, dtype)):
                absent[name, dtype] = reason
                if args.backends:
                    parser.error(f"--backends: {name} cannot be timed in {dtype}: {reason}")
    return absent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 if an implementation failed, or 2 for options that cannot be."""
    start = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    cases, absent = _cases(args, device, parser), _absent(args, device, parser)
    report = Report("operators", parser, args, argv)
    report.record["absent"] = [f"{', '.join(key)}: {reason}" for key, reason in absent.items()]
    report.say("\n".join(["not timed:", *report.record["absent"]]))
    trial = measure.Trial(device, measure.operator_clock(device), QUICK_SECONDS if args.quick else args.seconds)
    copy = measure.memory_copy(device)
    globs = args.compile if args.compile is not None else ["*"] if device.type == "cuda" else []
    for case in cases:
        for dtype in args.dtype:
            if time.perf_counter() - start > args.limit:
                report.record["skipped"].append(f"{case.name} {dtype}")
                continue
            names = [name for name in args.backends or backends.BACKENDS if (name, dtype) not in absent]
            # The reference comes first: the others are compared with it.
            found = implementations.native(case, sorted(names, key=lambda name: name != REFERENCE))
            if any(fnmatchcase(case.name, glob) for glob in globs):
                found.append(implementations.compiled(case))
            if args.baseline:
                found += implementations.baselines(case, device, getattr(torch, dtype))
            measure_case(trial, case, dtype, found, copy, report)
            torch.compiler.reset()  # compiled for this shape alone
    return report.finish()


def measure_case(
    trial: measure.Trial,
    case: Case,
    dtype: str,
    found: Sequence[Implementation],
    copy: measure.Call,
    report: Report,
) -> None:
    """Add the rows of both modes to the report, with a memory copy, timed in turn with the others, as the last."""
    elements = CPU_REFERENCE_ELEMENTS
    if trial.device.type == "cuda":
        elements = torch.cuda.get_device_properties(trial.device).total_memory // REFERENCE_BYTES
    # Large cases are checked on fewer images or channels, of the full size.
    check = implementations.Check(case.cropped(elements), trial.device, getattr(torch, dtype))
    inputs = case.inputs(trial.device, getattr(torch, dtype))
    output, flops = measure.dry_run(implementations.OPERATORS[case.operator], **inputs)
    for backward, mode in enumerate(MODES):
        size = compulsory_bytes(list(inputs.values()), output, bool(backward))
        gradient = gradient_like(output, trial.device) if backward else None
        entries = [_entry(case, implementation, check, inputs, gradient) for implementation in found]
        rows = trial.run([*entries, measure.Entry(COPY, lambda: copy)])
        seconds = {row["name"]: row["seconds"] for row in rows if "seconds" in row}
        for row in (row for row in rows[:-1] if "seconds" in row):
            row["times_reference"] = (REFERENCE in seconds and seconds[REFERENCE] / row["seconds"]) or None
            row["seconds_per_token"] = row["seconds"] / (case.batch * case.height * case.width)
            row["bandwidth"] = size / row["seconds"]
            row["fraction_of_copy"] = row["bandwidth"] * seconds[COPY] / (2 * measure.COPY_BYTES)
        rows[-1]["bandwidth"] = 2 * measure.COPY_BYTES / seconds[COPY]
        flops_of_mode = flops * (measure.TRAINING_PASSES if backward else 1)
        title = (
            f"{case.name}  {dtype}  {mode}: batch {case.batch}, {case.height}x{case.width} tokens, dim {case.dim}, "
            f"R {case.rank}, N {case.d_state}; compulsory {size / 1e6:.1f} MB, {flops_of_mode / 1e9:.2f} GFLOP, "
            f"{flops_of_mode / size:.1f} FLOP/byte"
        )
        report.add(title, COLUMNS, rows, **asdict(case), dtype=dtype, mode=mode, bytes=size, flops=flops_of_mode)


def _entry(
    case: Case,
    implementation: Implementation,
    check: implementations.Check,
    inputs: dict[str, Tensor],
    gradient: Tensor | None,
) -> measure.Entry:
    facts: dict[str, Any] = {"note": implementation.note}

    def make() -> measure.Call:
        facts["error"], facts["error_in"] = check.worst(implementation, gradient is not None)
        return implementation.bind(case, inputs, gradient)

    return measure.Entry(implementation.name, make, facts)


if __name__ == "__main__":
    sys.exit(main())
