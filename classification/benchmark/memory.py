"""Memory and time of training steps (plain, --use-checkpoint, --compile, both), and of inference against resolution.

A step is the trainer's: forward pass, soft cross entropy, backward pass, clipping, fused AdamW; without EMA.
"""

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from ...kernels.benchmark import measure, options
from ..config import load_config
from ..errors import InputError
from ..models.spatial_mamba import SpatialMamba
from ..optim import autocast_dtype
from ..trainer import build_model
from .command import VARIANTS, Parser, Report, Table, prepare, timing_record
from .parts import macs_per_image
from .training_step import TrainingStep

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
FORMS = {  # activation checkpointing, torch.compile
    "plain": (False, False),
    "checkpoint": (True, False),
    "compile": (False, True),
    "checkpoint+compile": (True, True),
}
REFUSED = "refused by the trainer: --compile with --use-checkpoint crashes PyTorch on a CPU"
BATCHES = {"cpu": 4, "cuda": 128}
SIZES = (224, 448, 1024, 2048, 4096)
TRAINING_COLUMNS = (
    "form", "ms per step", "images/s", "time", "step MB", "memory", "state MB", "GFLOP/s", "MFU",
)  # fmt: skip
INFERENCE_COLUMNS = (
    "image", "peak MB", "bytes per pixel", "off the line", "images timed", "ns per pixel", "time per pixel",
)  # fmt: skip


def variant_config(variant: str, overrides: Sequence[tuple[str, Any]] = ()) -> CfgNode:
    """The trainer's config of a variant."""
    return load_config(f"spatialmamba_{variant}", overrides)[0]


def training_step(variant: str, form: str, batch: int, size: int, device: torch.device, precision: str) -> TrainingStep:
    """The training step of one form of a variant; ``precision`` is one of ``PRECISIONS``."""
    checkpointing, compiled = FORMS[form]
    overrides: list[tuple[str, Any]] = [("TRAIN.USE_CHECKPOINT", checkpointing), ("AMP_ENABLE", precision != "float32")]
    if precision != "float32":
        overrides.append(("AMP_DTYPE", precision))
    config = variant_config(variant, overrides)
    return TrainingStep(config, batch, size, device, torch.compile if compiled else lambda model: model)


def training_rows(
    variant: str, forms: Sequence[str], batch: int, size: int, device: torch.device, precision: str, seconds: float
) -> list[dict[str, Any]]:
    """Measure the forms of a variant, timed in turn; a form that cannot be run says why.

    Returns:
        One row per form: seconds per step, bytes of state and, beyond it, at the peak of a step; or ``not_run`` if it
        does not fit into memory or is refused, which is a result, or else a ``failure``.
    """
    rows, steps = [], {}
    for form in forms:
        row: dict[str, Any] = {"variant": variant, "form": form, "batch": batch, "size": size}
        rows.append(row)
        if form == "checkpoint+compile" and device.type == "cpu":
            row["not_run"] = REFUSED
            continue
        try:
            step = training_step(variant, form, batch, size, device, precision)
            step()  # compiles; makes the optimiser's state
            step()
            row["dtype"] = _name(step.dtype)
            row["peak_bytes"] = measure.peak_memory(step, device)
        except Exception as failure:  # is no reason to stop the others
            row |= _outcome(failure)
            step = None
        if step is None:
            _release(device)
            continue
        row["state_bytes"] = step.state_bytes()
        row["operations"] = 2 * measure.TRAINING_PASSES * batch * macs_per_image(step.model, size, size)
        steps[form] = step
    timings = measure.interleave(steps, measure.clock_for(device), seconds) if steps else {}
    for row in rows:
        if row["form"] in timings:
            row |= timing_record(timings[row["form"]])
    return rows


def training_table(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, float], title: str) -> Table:
    """Times and memory, relative to the first form that ran; MFU against the speed of a large matrix product.

    Args:
        peaks: floating-point operations per second, by dtype.
    """
    first = next((row for row in rows if "seconds" in row), None)
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append((row["form"], *["-"] * (len(TRAINING_COLUMNS) - 1)))
            continue
        speed = row["operations"] / row["seconds"]
        lines.append(
            (
                row["form"],
                f"{1e3 * row['seconds']:.4g}",
                f"{row['batch'] / row['seconds']:.4g}",
                f"{row['seconds'] / first['seconds']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
                f"{row['state_bytes'] / 1e6:.0f}",
                f"{speed / 1e9:.0f}",
                f"{speed / peaks[row['dtype']]:.1%}",
            )
        )
    notes = [f"{row['form']}: {_reason(row)}" for row in rows if "seconds" not in row]
    return Table(title, TRAINING_COLUMNS, lines, notes)


@torch.no_grad()
def inference_rows(
    model: SpatialMamba, sizes: Sequence[int], device: torch.device, dtype: torch.dtype, seconds: float
) -> list[dict[str, Any]]:
    """Peak memory of one image of each size, and the time of as many as hold the pixels of a 1024x1024 image.

    So the time per pixel compares images of different sizes, not small calls with large ones.

    Args:
        model: in evaluation mode, with weights of ``dtype``; fused or not.
    """
    rows, calls = [], {}
    for size in sizes:
        row: dict[str, Any] = {"size": size, "timed_images": max(1, round(1024**2 / size**2))}
        rows.append(row)
        try:
            one, many = (
                torch.randn(count, model.in_chans, size, size, device=device).to(dtype)
                for count in (1, row["timed_images"])
            )
            model(one)
            row["peak_bytes"] = measure.peak_memory(lambda x=one: model(x), device)
            model(many)
        except Exception as failure:  # is no reason to stop the others
            row |= _outcome(failure)
            one = many = None
        if many is None:
            _release(device)
            continue
        calls[size] = lambda x=many: model(x)
    timings = measure.interleave(calls, measure.clock_for(device), seconds) if calls else {}
    for row in rows:
        if row["size"] in timings:
            row |= timing_record(timings[row["size"]])
            row["seconds_per_pixel"] = row["seconds"] / (row["timed_images"] * row["size"] ** 2)
    return rows


def fit_line(pixels: Sequence[int], peaks: Sequence[int]) -> tuple[float, float, list[float]]:
    """Bytes per pixel and fixed bytes that fit best, all points weighing alike relative to their size.

    Returns:
        Slope, intercept, and per point how far it lies off the line, as a fraction of the line's value.
    """
    slope, fixed = np.polyfit(pixels, peaks, deg=1, w=1 / np.asarray(peaks, dtype=float))
    line = slope * np.asarray(pixels, dtype=float) + fixed
    return float(slope), float(fixed), (np.asarray(peaks) / line - 1).tolist()


def inference_table(rows: Sequence[dict[str, Any]], title: str) -> tuple[Table, dict[str, float]]:
    """The table, and the line that fits the peaks: bytes per pixel, fixed bytes, largest deviation."""
    measured = [row for row in rows if "seconds" in row]
    fit: dict[str, float] = {}
    if len(measured) > 1:
        slope, fixed, off = fit_line([row["size"] ** 2 for row in measured], [row["peak_bytes"] for row in measured])
        for row, deviation in zip(measured, off, strict=True):
            row["off_the_line"] = deviation
        fit = {"bytes_per_pixel": slope, "fixed_bytes": fixed, "largest_deviation": max(map(abs, off))}
    lines = []
    for row in rows:
        name = f"{row['size']}x{row['size']}"
        if "seconds" not in row:
            lines.append((name, *["-"] * (len(INFERENCE_COLUMNS) - 1)))
            continue
        lines.append(
            (
                name,
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_bytes'] / row['size'] ** 2:.1f}",
                f"{row['off_the_line']:+.1%}" if "off_the_line" in row else "-",
                str(row["timed_images"]),
                f"{1e9 * row['seconds_per_pixel']:.4g}",
                f"{row['seconds_per_pixel'] / measured[0]['seconds_per_pixel']:.3f}",
            )
        )
    notes = [f"{row['size']}x{row['size']}: {_reason(row)}" for row in rows if "seconds" not in row]
    return Table(title, INFERENCE_COLUMNS, lines, notes), fit


def _outcome(failure: Exception) -> dict[str, str]:
    # PyTorch has an exception of its own for GPUs alone.
    if isinstance(failure, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(failure):
        return {"not_run": "out of memory"}
    return {"failure": measure.failure_text(failure)}


def _reason(row: Mapping[str, Any]) -> str:
    return row["not_run"] if "not_run" in row else f"failed: {row['failure']}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parser() -> Parser:
    parser = Parser("memory", __doc__)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--only", choices=("training", "inference"), help="by default both")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the training step")
    parser.add_argument(
        "--batch", type=options.whole_number, help="images per training step: by default 4 on a CPU, 128 on a GPU"
    )
    parser.add_argument("--size", type=options.image_size, default=224, help="of the training images")
    parser.add_argument(
        "--sizes", nargs="+", type=options.image_size, default=list(SIZES), help="of the inference images"
    )
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=True, help="inference after model.fuse()"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of both; auto: what the trainer takes on this device"
    )
    parser.add_argument("--seconds", type=options.seconds, default=10.0, help="of timing per variant and table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a measurement failed other than for memory, or 2 for options that cannot be."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    try:
        record = _run(parser, args, device)
    except InputError as error:
        parser.error(str(error))
    rows = record["training"] + [row for found in record["inference"] for row in found["rows"]]
    return int(any("failure" in row for row in rows))


def _run(parser: Parser, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    kept = prepare(device, args.threads)
    report = Report(parser, args, device)
    report.record |= {"freed_memory_kept": kept, "peaks": {}, "training": [], "inference": []}
    batch, peaks = args.batch or BATCHES[device.type], report.record["peaks"]
    form = "fused inference" if args.fuse else "inference"
    for variant in args.variant:
        if args.only != "inference":
            rows = training_rows(variant, args.forms, batch, args.size, device, args.precision, args.seconds)
            for name in {row["dtype"] for row in rows if "seconds" in row} - peaks.keys():
                peaks[name] = measure.matmul_peak(measure.clock_for(device), device, getattr(torch, name))
            report.record["training"] += rows
            roofs = "".join(
                f", {name}; matrix product {peaks[name] / 1e9:.0f} GFLOP/s"
                for name in dict.fromkeys(row["dtype"] for row in rows if "seconds" in row)
            )
            title = f"{variant}, training step, batch {batch} at {args.size}x{args.size}{roofs}"
            report.table(training_table(rows, peaks, title))
            torch.compiler.reset()
        if args.only != "training":
            config = variant_config(variant)
            dtype = autocast_dtype(config, device) if args.precision == "auto" else getattr(torch, args.precision)
            model = build_model(config, config.MODEL.NUM_CLASSES).to(device, dtype).eval()
            if args.fuse:
                model.fuse()
            rows = inference_rows(model, sorted(set(args.sizes)), device, dtype, args.seconds)
            table, fit = inference_table(rows, f"{variant}, {form} in {_name(dtype)}, peak memory of one image")
            report.record["inference"].append({"variant": variant, "dtype": _name(dtype), "rows": rows, **fit})
            report.table(table)
            if fit:
                report.say(
                    f"Peak memory fits {fit['bytes_per_pixel']:.1f} bytes per pixel + {fit['fixed_bytes'] / 1e6:.2f} MB"
                    f"; no image is further than {fit['largest_deviation']:.1%} off that line"
                )
    report.write()
    return report.record


if __name__ == "__main__":
    sys.exit(main())
