"""Time Spatial-Mamba, compared with its baseline (the published formulation) and timm's models of the same sizes.

All models take turns on the same random images. --parts instead times the parts of Spatial-Mamba, and --processes
data-parallel training steps. Prints tables, and writes models.json, parts.json or processes.json, and the plots
accuracy.png and resolution.png.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial

import timm
import torch
from tqdm import tqdm

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import BATCHES, DTYPES, NOTE, PEAK, TIMES, Column, Parser, Report
from ...kernels.command_line import run_command, whole_number
from ...kernels.errors import UserError
from ..command_line import image_size
from . import parts, plots, processes, roster
from .prepared import AOTI, CUDAGRAPH, EAGER, EXPORTED, FORMS, FUSED, INFERENCE, MODES, TRAIN, Case, form_of, make_call

COLUMNS = (
    Column("", "name"),
    *TIMES,
    Column("images/s", "images_per_second", ".4g"),
    Column("x time", "times_first", ".2f"),
    PEAK,
    Column("weights MB", "weight_bytes", ".1f", 1e-6),
    NOTE,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0, 1 if a model failed, or 2 for wrong options."""
    return run_command(_benchmark, argv)


def _parser() -> Parser:
    example = "--models '*tiny*' --form eager fused --mode inference train"
    parser = Parser("spatial-mamba benchmark models", __doc__, example, seconds=10.0, of="case, all models together")
    add = parser.add_argument
    add("--models", nargs="+", metavar="GLOB", default=["*"], help="names or patterns, e.g. '*tiny*' (default: all)")
    add("--mode", nargs="+", choices=MODES, default=[INFERENCE])
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of weights; in training, of autocast")
    text = f"{', '.join(FORMS)} (default: {EAGER}); models without a form run in the closest one"
    add("--form", nargs="+", choices=FORMS, default=[EAGER], metavar="FORM", help=text)
    add("--batch", nargs="+", type=whole_number, metavar="N", help="images (default: 8 on a CPU, 128 on a GPU)")
    side = roster.BASE_RESOLUTION
    add("--resolution", nargs="+", type=image_size, default=[side], metavar="N", help=f"of images (default: {side})")
    add("--same-pixels", action="store_true", help="--batch counts images of 224x224; keep its pixels at other sizes")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--parts", action="store_true", help="time each part of Spatial-Mamba by itself")
    text = "time training steps over N processes; --batch and --threads (default: 1) are per process"
    kind.add_argument("--processes", nargs="+", type=whole_number, metavar="N", help=text)
    return parser


def _check(args: argparse.Namespace, models: Sequence[roster.Model]) -> None:
    """Raise a UserError for options that contradict each other."""
    for form in args.form:
        if (args.parts and form not in (EAGER, FUSED)) or (args.processes and form != EAGER):
            raise UserError(f"--form {form}: --parts takes eager and fused, --processes eager")
        if form == CUDAGRAPH and args.device != "cuda":
            raise UserError(f"--form {form}: CUDA graphs need a GPU, but the device is {args.device}")
        if form in EXPORTED and args.dtype != ["float32"]:
            raise UserError(f"--form {form}: exported files run in float32; leave out --dtype")
        if form in EXPORTED and form != AOTI and args.device != "cpu":
            raise UserError(f"--form {form}: ONNX files are timed on the CPU; add --device cpu")
        if form in EXPORTED:
            from ..export.onnx_file import require_exporter
            from ..export.programs import require_compiler

            (require_compiler if form == AOTI else require_exporter)()
    if args.parts and not any(model.family == roster.OURS for model in models):
        raise UserError("--parts: only spatial_mamba_tiny, _small and _base have parts; name one of them in --models")
    gpus = torch.cuda.device_count()
    if args.processes and args.device == "cuda" and max(args.processes) > gpus:
        raise UserError(f"--processes {max(args.processes)}: each process needs its own GPU, but there are {gpus}")


def _benchmark(argv: Sequence[str] | None) -> int:
    start, args = time.perf_counter(), _parser().parse_args(argv)
    models = roster.choose(args.models)
    _check(args, models)
    report = Report("parts" if args.parts else "processes" if args.processes else "models", args)
    report.record["environment"]["timm"] = timm.__version__
    clock = measure.operator_clock(report.device) if args.parts else measure.wall_clock(report.device)
    trial = measure.Trial(report.device, clock, args.seconds, start + args.limit)
    modes, batches = [TRAIN] if args.processes else args.mode, args.batch or [BATCHES[args.device]]
    for mode, dtype, resolution, batch in itertools.product(modes, args.dtype, args.resolution, batches):
        same = max(1, batch * roster.BASE_RESOLUTION**2 // resolution**2)
        case = Case(mode, dtype, resolution, same if args.same_pixels else batch)
        if trial.is_late():
            report.record["skipped"].append(str(case))
        elif args.processes:
            processes.add_tables(report, models, case, args)
        else:
            pairs = list(dict.fromkeys((m, form_of(m, form, mode)) for m in models for form in args.form))
            (parts.add_tables if args.parts else add_table)(report, pairs, case, trial)
        torch.compiler.reset()  # graphs compiled for this shape
        measure.release(report.device)
    if report.path.stem == "models":
        plots.draw(args.out, report.record["results"])
    return report.finish()


def add_table(report: Report, pairs: Sequence[tuple[roster.Model, str]], case: Case, trial: measure.Trial) -> None:
    """Time models in their forms on one case; ``x time`` is relative to the first row."""
    progress = tqdm(pairs, f"preparing {case}", disable=None, leave=False)
    rows = trial.run((f"{m.name}, {form}", partial(make_call, m, form, case, trial.device)) for m, form in progress)
    for row in rows:
        if "seconds" in row:
            row["images_per_second"] = case.images / row["seconds"]
            row["times_first"] = row["seconds"] / rows[0]["seconds"] if "seconds" in rows[0] else None
    report.add(f"{case}; peak MB beyond weights and optimiser state", COLUMNS, rows, **vars(case))


if __name__ == "__main__":
    sys.exit(main())
