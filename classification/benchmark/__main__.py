"""Time Spatial-Mamba as a whole, compared with its published formulation and timm's models of the same sizes.

All take turns, round by round, on the same random images. --parts times the parts of Spatial-Mamba instead, and
--processes data-parallel training steps. Prints tables, and writes models.txt and models.json, or parts.* or
processes.*; and accuracy.png and resolution.png.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

import timm
import torch

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import BATCHES, DTYPES, NOTE, PEAK, TIMES, Column, Parser, Report
from ...kernels.command_line import whole_number
from ...kernels.errors import UserError
from ..command_line import image_size
from . import parts, plots, processes, roster
from .prepared import AOTI, CUDAGRAPH, EAGER, EXPORTED, FORMS, FUSED, INFERENCE, MODES, TRAIN, Case, entry, form_of

COLUMNS = (
    Column("", "name"),
    *TIMES,
    Column("images/s", "images_per_second", ".4g"),
    Column("x time", "times_reference", ".2f"),
    PEAK,
    Column("weights MB", "weight_bytes", ".1f", 1e-6),
    Column("ns/pixel", "seconds_per_pixel", ".4g", 1e9),
    Column("peak bytes/pixel", "bytes_per_pixel", ".1f"),
    Column("MFU", "mfu", ".1%"),
    NOTE,
)


def _parser() -> Parser:
    parser = Parser("classification.benchmark", __doc__, 10.0, "case, all models together")
    add = parser.add_argument
    add("--models", nargs="+", metavar="GLOB", default=["*"], help="names or patterns, e.g. '*tiny*'; by default all")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="timm's models too")
    add("--relative-to", metavar="NAME", help="the model that times are divided by: by default the first one")
    add("--mode", nargs="+", choices=MODES, default=[INFERENCE])
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of weights; in training, of autocast")
    add("--form", nargs="+", choices=FORMS, default=[EAGER], help="models that lack one run without it")
    add("--batch", nargs="+", type=whole_number, help="images: by default 8 on a CPU, 128 on a GPU")
    add("--resolution", nargs="+", type=image_size, default=[roster.BASE_RESOLUTION], help="sides of the images")
    add(
        "--same-pixels",
        action="store_true",
        help="--batch counts images of 224x224; of larger ones take fewer, of smaller ones more",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--parts", action="store_true", help="time the parts of each Spatial-Mamba by themselves")
    kind.add_argument(
        "--processes",
        nargs="+",
        type=whole_number,
        metavar="N",
        help="time training steps over N processes; --batch counts images, --threads threads (1) of each",
    )
    return parser


def _check(args: argparse.Namespace, models: Sequence[roster.Model], device: torch.device, parser: Parser) -> None:
    names = [model.name for model in models]
    if args.relative_to and args.relative_to not in names:
        parser.error(f"--relative-to: {args.relative_to!r} is none of the models that take part: {', '.join(names)}")
    if CUDAGRAPH in args.form and device.type != "cuda":
        parser.error(f"--form {CUDAGRAPH}: CUDA graphs need a GPU, but the device is {device}")
    for form in args.form:
        if (args.parts and form not in (EAGER, FUSED)) or (args.processes and form != EAGER):
            parser.error(f"--form {form}: --parts takes eager and fused, --processes eager")
    for form in set(args.form) & set(EXPORTED):
        if args.dtype != ["float32"]:
            parser.error(f"--form {form}: exported files run in float32; leave out --dtype")
        if form != AOTI and device.type != "cpu":
            parser.error(f"--form {form}: ONNX files are timed on the CPU; add --device cpu")
        from ..export.onnx_file import require_onnx
        from ..export.programs import require_compiler

        try:
            (require_compiler if form == AOTI else require_onnx)()
        except UserError as error:
            parser.error(f"--form {form}: {error}")
    if args.parts and not any(model.family == roster.OURS for model in models):
        parser.error("--parts: only spatial_mamba_tiny, _small and _base have parts; name one of them in --models")
    if args.processes and device.type == "cuda" and max(args.processes) > torch.cuda.device_count():
        most = torch.cuda.device_count()
        parser.error(f"--processes {max(args.processes)}: each needs a GPU, there are {most}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 if a model failed, or 2 for options that cannot be."""
    start = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    try:
        models = roster.choose(args.models, args.peers)
    except ValueError as error:
        parser.error(f"--models: {error}")
    _check(args, models, device, parser)
    report = Report("parts" if args.parts else "processes" if args.processes else "models", parser, args, argv)
    report.record["environment"]["timm"] = timm.__version__

    trial = measure.Trial(device, measure.WallClock(device), args.seconds, start + args.limit)
    modes = [TRAIN] if args.processes else args.mode
    batches = args.batch or [BATCHES[device.type]]
    for mode, dtype, resolution, batch in itertools.product(modes, args.dtype, args.resolution, batches):
        same = max(1, batch * roster.BASE_RESOLUTION**2 // resolution**2)
        case = Case(mode, dtype, resolution, same if args.same_pixels else batch)
        if trial.is_late():
            report.record["skipped"].append(str(case))
        elif args.processes:
            processes.add_tables(report, models, case, device.type, args)
        else:
            takes_part = [(model, form_of(model, form, mode)) for model in models for form in args.form]
            takes_part = list(dict.fromkeys(takes_part))  # each once
            if args.parts:
                parts.add_tables(report, takes_part, case, device, args.seconds)
            else:
                add_table(report, takes_part, case, trial, args.relative_to or models[0].name)
        torch.compiler.reset()  # compiled for this shape alone
        measure.release(device)
    _draw(report)
    return report.finish()


def add_table(
    report: Report, takes_part: Sequence[tuple[roster.Model, str]], case: Case, trial: measure.Trial, reference: str
) -> None:
    """Time all models on one case; ``reference`` names the one that times are divided by."""
    peak = measure.matmul_peak(trial.clock, trial.device, getattr(torch, case.dtype))
    rows = trial.run([entry(model, form, case, trial.device, trial.clock) for model, form in takes_part])
    pixels = case.images * case.resolution**2
    for row in rows:
        if "seconds" in row:
            flops = row["flops_per_image"] * (measure.TRAINING_PASSES if case.mode == TRAIN else 1)
            row["images_per_second"] = case.images / row["seconds"]
            row["mfu"] = flops * row["images_per_second"] / peak
            row["seconds_per_pixel"] = row["seconds"] / pixels
            row["bytes_per_pixel"] = row["peak_bytes"] and row["peak_bytes"] / pixels
    add_ratios(rows, reference)
    title = (
        f"{case}: x time relative to {reference}; peak MB of a call, beyond weights and optimiser state; 100% MFU is "
        f"{peak / 1e9:.0f} GFLOP/s, of a {case.dtype} matrix product"
    )
    report.add(title, COLUMNS, rows, **vars(case), relative_to=reference, peak=peak)


def add_ratios(rows: Sequence[measure.Row], reference: str) -> None:
    """Give each timed row its time over that of the reference in the same form, or else in its first form.

    Exported files are compared with the first form.
    """
    found = [row for row in rows if row["model"] == reference and "seconds" in row and row["form"] not in EXPORTED]
    forms = {row["form"]: row["seconds"] for row in found}
    for row in rows:
        if forms and "seconds" in row:
            row["times_reference"] = row["seconds"] / forms.get(row["form"], next(iter(forms.values())))


def _draw(report: Report) -> None:
    if report.path.name == "models":
        try:
            report.say("; ".join(plots.draw(report.path.parent, report.record["results"])))
        except ImportError as error:
            print(f"no plots: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
