"""Time the operators of Spatial-Mamba: every backend present, beside the published formulations in PyTorch.

Prints tables, and writes benchmark.json, benchmark.txt and roofline.png.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .. import backends
from . import measure, report
from .cases import Case, all_cases
from .competitors import DEFINITION
from .options import BATCHES, DTYPES, OneLineParser, seconds, user_path, whole_number
from .trial import Bench, Choices

QUICK_CASES, QUICK_SECONDS = ["*/tiny/stage1/224x224"], 0.5


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m spatial_mamba.kernels.benchmark", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is a GPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the activations")
    parser.add_argument("--threads", type=whole_number, help="of PyTorch on the CPU")
    parser.add_argument("--batch", type=whole_number, help="images of 224x224: by default 8 on a CPU, 128 on a GPU")
    parser.add_argument("--cases", nargs="+", metavar="GLOB", help="e.g. 'core/tiny/*'; by default all")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="by default all that can be used here")
    parser.add_argument(
        "--published", action=argparse.BooleanOptionalAction, default=True, help="the published formulations too"
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="GLOB",
        help="cases on which torch.compile takes part, a minute each: by default all on a GPU, none on a CPU",
    )
    parser.add_argument("--seconds", type=seconds, help="of timing per case, dtype and mode (default 5)")
    parser.add_argument("--quick", action="store_true", help="few cases, half a second each")
    parser.add_argument("--limit", type=seconds, metavar="SECONDS", help="start no further case after that time")
    parser.add_argument("--out", type=user_path, default=Path("output/benchmark"), help="folder for the results")
    parser.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU: do not return freed memory to the system, as on a GPU",
    )
    return parser


def _cases(args: argparse.Namespace, device: torch.device, parser: OneLineParser) -> list[Case]:
    known = all_cases(args.batch or BATCHES[device.type])
    globs = args.cases or (QUICK_CASES if args.quick else ["*"])
    for glob in globs:
        if not any(fnmatchcase(case.name, glob) for case in known):
            parser.error(f"--cases: {glob!r} matches none of {', '.join(case.name for case in known)}")
    return [case for case in known if any(fnmatchcase(case.name, glob) for glob in globs)]


def _choices(args: argparse.Namespace, device: torch.device, parser: OneLineParser) -> Choices:
    for name in args.backends or ():
        if name not in backends.BACKENDS:
            parser.error(f"--backends: {name!r} is none of {', '.join(backends.BACKENDS)}")
    default = ["*"] if device.type == "cuda" else []
    return Choices(
        device,
        # The definition comes first: the others are compared with it.
        backends=sorted(args.backends or backends.BACKENDS, key=lambda name: name != DEFINITION),
        published=args.published,
        compiled=default if args.compile is None else args.compile,
        seconds=args.seconds or (QUICK_SECONDS if args.quick else 5.0),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 if a competitor failed, or 2 for options that cannot be."""
    start = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    cases, choices = _cases(args, device, parser), _choices(args, device, parser)
    dtypes = [getattr(torch, name) for name in args.dtype]
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = device.type == "cpu" and args.keep_freed_memory and measure.keep_freed_memory()

    absent = {str(dtype).removeprefix("torch."): choices.absent(dtype) for dtype in dtypes}
    for dtype, reasons in absent.items():
        for name in args.backends or ():
            if name in reasons:
                parser.error(f"--backends: {name} cannot be timed in {dtype}: {reasons[name]}")

    parser.folder(args.out)

    bench = Bench(choices)
    record: dict[str, Any] = {
        "environment": report.environment(device) | {"freed_memory_kept": kept},
        "absent": absent,
        "peak": bench.peak(),
        "skipped": [],
        "results": [],
    }
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say("; ".join(f"{name} {value}" for name, value in record["environment"].items()))
    say(f"float32 matrix product: {record['peak'] / 1e9:.0f} GFLOP/s")
    for dtype, reasons in absent.items():
        for name, reason in reasons.items():
            say(f"not timed: {name}, {dtype}: {reason}")
    say("")
    for case in cases:
        for dtype in dtypes:
            if args.limit and time.perf_counter() - start > args.limit:
                record["skipped"].append(f"{case.name} {dtype}")
                continue
            for result in bench.run(case, dtype):
                record["results"].append(result)
                say(report.table(result))
            report.write(args.out, record, "\n".join(lines))  # what is measured is kept if the rest breaks off

    for line in report.per_token(record["results"]):
        say(line)
    if record["skipped"]:
        say(f"out of time: {', '.join(record['skipped'])}")
    report.write(args.out, record, "\n".join(lines))
    _draw(args.out / "roofline.png", record)
    print(f"written to {args.out}")
    return int(any("failure" in row for result in record["results"] for row in result["rows"]))


def _draw(path: Path, record: dict[str, Any]) -> None:
    try:
        report.roofline(path, record["results"], record["peak"])
    except ImportError as error:
        print(f"no roofline plot: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
