"""Time Spatial-Mamba as a whole beside its published formulation and timm's models of the same sizes.

All take turns, round by round, on the same random images. Prints tables, and writes benchmark.txt, benchmark.json,
accuracy.png, resolution.png and batch.png.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...kernels.benchmark import measure
from ...kernels.benchmark import report as files
from ...kernels.benchmark.options import BATCHES, DTYPES, OneLineParser, image_size, seconds, user_path, whole_number
from . import plots, report, roster
from .competitors import CUDAGRAPH, EAGER, FORMS, INFERENCE, MODES
from .trial import Bench, Choices

PROGRAM = "python -m spatial_mamba.classification.benchmark"


def _parser() -> OneLineParser:
    parser = OneLineParser(prog=PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="GLOB", default=["*"], help="names or patterns, e.g. '*tiny*'; by default all")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="timm's models too")
    add("--relative-to", metavar="NAME", help="the model that times are divided by: by default the first one")
    add("--mode", nargs="+", choices=MODES, default=[INFERENCE])
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of weights; in training, of autocast")
    add("--form", nargs="+", choices=FORMS, default=[EAGER], help="peers have no fuse(): they are run without it")
    add("--batch", nargs="+", type=whole_number, help="images: by default 8 on a CPU, 128 on a GPU")
    add(
        "--resolution",
        nargs="+",
        type=image_size,
        default=[roster.BASE_RESOLUTION],
        help="sides of the images, in pixels",
    )
    add(
        "--same-pixels",
        action="store_true",
        help="--batch counts images of 224x224; of larger ones take fewer, of smaller ones more",
    )
    add("--device", choices=("cpu", "cuda"), help="by default cuda where there is a GPU")
    add("--threads", type=whole_number, help="of PyTorch on the CPU")
    add("--seconds", type=seconds, default=10.0, help="of timing per case, all competitors together (default 10)")
    add("--limit", type=seconds, metavar="SECONDS", help="start nothing more after that time")
    add("--out", type=user_path, default=Path("output/model_benchmark"), help="folder for the results")
    add(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU: do not return freed memory to the system, as on a GPU",
    )
    return parser


def _choices(args: argparse.Namespace, parser: OneLineParser, start: float) -> Choices:
    device = parser.device(args.device)
    if CUDAGRAPH in args.form and device.type != "cuda":
        parser.error(f"--form {CUDAGRAPH}: CUDA graphs need a GPU, but the device is {device}")
    try:
        models = roster.choose(args.models, args.peers)
    except ValueError as error:
        parser.error(f"--models: {error}")
    names = [model.name for model in models]
    if args.relative_to and args.relative_to not in names:
        parser.error(f"--relative-to: {args.relative_to!r} is none of the models that take part: {', '.join(names)}")
    deadline = start + args.limit if args.limit else float("inf")
    return Choices(device, models, args.form, args.seconds, args.same_pixels, deadline)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 if a competitor failed, or 2 for options that cannot be."""
    start = time.perf_counter()
    parser = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    choices = _choices(args, parser, start)
    parser.folder(args.out)
    device = choices.device
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = device.type == "cpu" and args.keep_freed_memory and measure.keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # each competitor gets its fastest convolutions

    bench = Bench(choices)
    reference = args.relative_to or choices.models[0].name
    record: dict[str, Any] = {
        "command": shlex.join([*PROGRAM.split(), *arguments]),
        "environment": report.environment(device) | {"freed_memory_kept": kept},
        "energy": bench.energy,
        "relative_to": reference,
        "results": [],
        "per_pixel": [],
        "skipped": [],
    }
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say(record["command"])
    say("; ".join(f"{name} {value}" for name, value in record["environment"].items()))
    say(f"energy: {bench.energy}\n")
    batches = args.batch or [BATCHES[device.type]]
    for mode in args.mode:
        for dtype in args.dtype:
            for resolution in args.resolution:
                done = 0
                for result in bench.run(mode, dtype, resolution, batches):
                    report.add_ratios(result["rows"], reference)
                    record["results"].append(result)
                    say(report.table(result))
                    files.write(args.out, record, "\n".join(lines))  # what is measured is kept if the rest breaks off
                    done += 1
                cases = (f"{mode} {dtype} {resolution}x{resolution} batch {batch}" for batch in batches[done:])
                record["skipped"] += cases

    record["per_pixel"] = report.per_pixel(record["results"])
    for text in report.per_pixel_tables(record["per_pixel"]):
        say(text)
    if record["skipped"]:
        say(f"out of time: {', '.join(record['skipped'])}")
    files.write(args.out, record, "\n".join(lines))
    _draw(args.out, record["results"])
    print(f"written to {args.out}")
    rows = [row for result in record["results"] for row in result["rows"]]
    if len(report.timed(rows)) < len(rows) or record["skipped"]:  # the last line, which `make gpu` shows
        missing = len(rows) - len(report.timed(rows))
        print(f"competitors not measured: {missing}; cases out of time: {len(record['skipped'])}")
    return int(any("failure" in row for row in rows))


def _draw(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    try:
        for name, reason in plots.draw(folder, results).items():
            print(f"no {name}: {reason}")
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
