"""Data-parallel scaling: measured over the processes of this machine, and computed for many GPUs.

Measured are the trainer's steps on random images with a fixed batch per process, synchronised and not. Computed are the
bytes that a step sends, and from them, a step time and the bandwidths of the links how speed grows with the GPUs: on a
GPU, or from a given --step-seconds. Each process has one thread.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from ...kernels.benchmark.measure import TRAINING_PASSES
from ...kernels.benchmark.options import image_size, positive, seconds, whole_number
from ..config import load_config
from ..errors import InputError
from ..models.flops import count_parameters
from ..trainer import build_model
from .command import Parser, Report, Table, prepare
from .training_step import TrainingStep, class_count

GPUS = (1, 8, 16, 32, 64)
BUCKET_BYTES = 25 * 2**20  # PyTorch's default: what DDP sends at once
STRIDE_WARNING = "Grad strides do not match bucket view strides"
MEASURED_COLUMNS = (
    "processes", "ms per step", "images/s", "efficiency", "without all-reduce ms", "visible all-reduce ms",
    "all-reduce alone ms",
)  # fmt: skip
EXPECTED_COLUMNS = (
    "GPUs", "nodes", "MB sent per GPU", "all-reduce ms", "images/s", "efficiency", "images/s overlapped",
    "efficiency overlapped",
)  # fmt: skip


class Links(NamedTuple):
    """Bytes per second that a GPU sends, and receives at the same time."""

    within_node: float
    between_nodes: float
    gpus_per_node: int


class Workload(NamedTuple):
    """What every process trains."""

    config: CfgNode
    batch: int
    size: int
    seconds: float


def ring_bytes(gradient_bytes: int, processes: int) -> float:
    """Bytes that each process sends in a ring all-reduce: 2 (n - 1) / n of the gradients."""
    return 2 * (processes - 1) / processes * gradient_bytes


def all_reduce_seconds(gradient_bytes: int, processes: int, links: Links) -> float:
    """Time of one ring through all GPUs, which goes at the pace of the slowest link in it; latency is left out."""
    within = processes <= links.gpus_per_node
    bandwidth = links.within_node if within else min(links.within_node, links.between_nodes)
    return ring_bytes(gradient_bytes, processes) / bandwidth


def overlapped_seconds(step_seconds: float, reduce_seconds: float, gradient_bytes: int) -> float:
    """Time of a step whose all-reduce runs behind the backward pass, which is taken for two thirds of the step.

    What does not fit behind it is visible, and in any case the last bucket, which is complete only at its end.
    """
    backward = step_seconds * (TRAINING_PASSES - 1) / TRAINING_PASSES
    last_bucket = reduce_seconds * min(1.0, BUCKET_BYTES / gradient_bytes)
    return step_seconds + max(reduce_seconds - backward, last_bucket)


def expectation(
    gpus: Sequence[int], step_seconds: float, batch: int, gradient_bytes: int, links: Links
) -> list[dict[str, float]]:
    """Speed of that many GPUs with a fixed batch each, with and without overlap of communication and computation.

    Args:
        step_seconds: of one GPU alone.
        batch: images per GPU and step.
    """
    rows = []
    for count in gpus:
        reduce = all_reduce_seconds(gradient_bytes, count, links)
        plain, overlapped = step_seconds + reduce, overlapped_seconds(step_seconds, reduce, gradient_bytes)
        rows.append(
            {
                "gpus": count,
                "nodes": -(-count // links.gpus_per_node),
                "bytes_sent": ring_bytes(gradient_bytes, count),
                "all_reduce_seconds": reduce,
                "images_per_second": count * batch / plain,
                "efficiency": step_seconds / plain,
                "images_per_second_overlapped": count * batch / overlapped,
                "efficiency_overlapped": step_seconds / overlapped,
            }
        )
    return rows


def measure(work: Workload, processes: int, device: str) -> dict[str, Any]:
    """Start that many processes, with a thread (and on ``cuda`` a GPU) each, and time their steps.

    Returns:
        Seconds of a step, synchronised and not, and of one all-reduce of as many bytes as the gradients have, alone;
        medians of the slowest process of each round. Bytes of the gradients, and what is unlike in strides.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (processes, work, device, folder), nprocs=processes)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _process(rank: int, processes: int, work: Workload, device_name: str, folder: str) -> None:
    device = torch.device(device_name, rank) if device_name == "cuda" else torch.device("cpu")
    prepare(device, threads=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/meeting", rank=rank, world_size=processes)
    torch.manual_seed(rank)

    def parallel(model: nn.Module) -> nn.Module:  # as in the trainer
        devices = [rank] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    step = TrainingStep(work.config, work.batch, work.size, device, parallel if processes > 1 else lambda model: model)
    found: dict[str, Any] = {
        "gradient_bytes": step.gradient_bytes(),
        "unlike_strides": step.unlike_strides(),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    found["stride_warning"] = any(STRIDE_WARNING in str(warning.message) for warning in caught)
    calls: dict[str, Callable[[], object]] = {"step": step}
    if processes > 1:
        flat = torch.zeros(found["gradient_bytes"] // 4, device=device)
        calls |= {"unsynchronised": step.unsynchronised, "all_reduce": lambda: dist.all_reduce(flat)}
    found |= {name: statistics.median(times) for name, times in _rounds(calls, device, work.seconds).items()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    # gloo's threads let go of the tensor of an all-reduce a little after it has returned, for which they need the
    # interpreter. Taking the process group down waits for them without releasing it, and now and then for ever.
    os._exit(0)


def _rounds(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Times of the slowest process, calls in turn, until the time is up on any process and each ran three times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while True:
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(_largest(time.perf_counter() - begin, device))
        rounds = len(next(iter(times.values())))
        if rounds >= 3 and _largest(time.perf_counter() - start, device) > seconds:
            return times


def _largest(value: float, device: torch.device) -> float:
    tensor: Tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def single_step(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of a step of one process; where none ran alone, of the fewest, each going by its own gradients."""
    return rows[0].get("unsynchronised", rows[0]["step"])


def measured_table(rows: Sequence[dict[str, Any]], batch: int, title: str) -> Table:
    """Speed and efficiency relative to ``single_step``, per process."""
    lines, single = [], single_step(rows)
    for row in rows:
        has_peers = "unsynchronised" in row
        lines.append(
            (
                str(row["processes"]),
                f"{1e3 * row['step']:.1f}",
                f"{row['processes'] * batch / row['step']:.2f}",
                f"{single / row['step']:.1%}",
                f"{1e3 * row['unsynchronised']:.1f}" if has_peers else "-",
                f"{1e3 * (row['step'] - row['unsynchronised']):.1f}" if has_peers else "-",
                f"{1e3 * row['all_reduce']:.1f}" if has_peers else "-",
            )
        )
    return Table(title, MEASURED_COLUMNS, lines)


def expected_table(rows: Sequence[dict[str, float]], title: str) -> Table:
    """The rows of ``expectation``."""
    lines = [
        (
            str(row["gpus"]),
            str(row["nodes"]),
            f"{row['bytes_sent'] / 1e6:.1f}",
            f"{1e3 * row['all_reduce_seconds']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['efficiency']:.1%}",
            f"{row['images_per_second_overlapped']:.0f}",
            f"{row['efficiency_overlapped']:.1%}",
        )
        for row in rows
    ]
    return Table(title, EXPECTED_COLUMNS, lines)


def _parser() -> Parser:
    parser = Parser("scaling", __doc__, takes_threads=False)
    add = parser.add_argument
    add("--cfg", default="spatialmamba_tiny", metavar="FILE", help="the trainer's config")
    add(
        "--processes",
        nargs="*",
        type=whole_number,
        help="to measure with: by default 1, 2, 4 to all cores or GPUs",
    )
    add(
        "--batch-size",
        type=whole_number,
        help="images per process: by default 2 on a CPU, the config's on a GPU",
    )
    add("--size", type=image_size, help="of the images: by default the config's")
    add("--seconds", type=seconds, default=10.0, help="of timing per number of processes")
    add("--gpus", nargs="+", type=whole_number, default=list(GPUS), help="to compute the scaling for")
    add("--step-seconds", type=seconds, help="of one GPU with --batch-size images: by default as measured")
    add("--gpus-per-node", type=whole_number, default=8)
    add("--within-node", type=positive, default=450.0, metavar="GB/S", help="per GPU and direction (NVLink 4: 450)")
    add("--between-nodes", type=positive, default=50.0, metavar="GB/S", help="per GPU and direction (400 Gb/s: 50)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for options that cannot be."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    try:
        _run(parser, args, device)
    except InputError as error:
        parser.error(str(error))
    return 0


def _run(parser: Parser, args: argparse.Namespace, device: torch.device) -> None:
    config, _ = load_config(args.cfg)
    on_gpu = device.type == "cuda"
    most = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    counts = args.processes
    if counts is None:
        counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
    if on_gpu and max(counts, default=0) > most:
        raise InputError(f"--processes {max(counts)}: each needs a GPU, there are {most}")
    if not counts and not args.step_seconds:
        raise InputError("--processes without numbers measures nothing: give a --step-seconds to compute from")
    batch = args.batch_size or (config.DATA.BATCH_SIZE if on_gpu else 2)
    work = Workload(config, batch, args.size or config.DATA.IMG_SIZE, args.seconds)
    report = Report(parser, args, device)
    report.record |= {"batch": batch, "size": work.size, "measured": [], "expected": []}

    rows = report.record["measured"]
    for count in sorted(set(counts)):
        rows.append({"processes": count, **measure(work, count, device.type)})
        report.write()
    setting = f"{config.MODEL.NAME}, {batch} images of {work.size}x{work.size} per process"
    if rows:
        report.table(measured_table(rows, batch, f"{setting}, on {device.type}, one thread per process"))
        unlike, warned = rows[-1]["unlike_strides"], rows[-1]["stride_warning"]
        patterns = dict.fromkeys(re.sub(r"\.\d+\b", ".*", name) for name in unlike)
        report.say(
            f"{len(unlike)} gradients in other strides than their parameters{': ' if unlike else ''}"
            f"{', '.join(patterns)}; DDP {'warns' if warned else 'does not warn'} of bucket strides"
        )
    gradient_bytes = 4 * count_parameters(build_model(config, class_count(config)))
    report.record["gradient_bytes"] = gradient_bytes
    if not args.step_seconds and not on_gpu:
        report.say("Nothing is computed for GPUs from the step of a CPU: give a --step-seconds to compute from")
        report.write()
        return
    step_seconds = args.step_seconds or single_step(rows)
    links = Links(1e9 * args.within_node, 1e9 * args.between_nodes, args.gpus_per_node)
    expected = expectation(args.gpus, step_seconds, batch, gradient_bytes, links)
    report.record |= {"step_seconds": step_seconds, "expected": expected}
    source = "given" if args.step_seconds else f"measured on {device.type}"
    title = (
        f"Computed: {setting}, {1e3 * step_seconds:.1f} ms per step ({source}), {gradient_bytes / 1e6:.1f} MB of "
        f"gradients, {args.within_node:g} GB/s in nodes of {args.gpus_per_node}, {args.between_nodes:g} GB/s between"
    )
    report.table(expected_table(expected, title))


if __name__ == "__main__":
    sys.exit(main())
