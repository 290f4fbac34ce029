"""Data-parallel training steps over the processes of this machine, with and without all-reduce."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import Column, Report, prepare
from .prepared import EAGER, Case, Prepared
from .roster import Model

COLUMNS = (
    Column("processes", "processes", "d"),
    Column("ms per step", "seconds", ".1f", 1e3),
    Column("images/s", "images_per_second", ".2f"),
    Column("efficiency", "efficiency", ".1%"),
    Column("without all-reduce ms", "unsynchronised", ".1f", 1e3),
    Column("visible all-reduce ms", "visible", ".1f", 1e3),
    Column("all-reduce alone ms", "all_reduce", ".1f", 1e3),
)


def add_tables(report: Report, models: Sequence[Model], case: Case, args: argparse.Namespace) -> None:
    """Add one table per model to the report, with a row per number of processes.

    Efficiency is relative to the smallest number of processes; if that is above 1, to its step without all-reduce.
    """
    for model in models:
        rows: list[measure.Row] = []
        for count in tqdm(sorted(set(args.processes)), f"{model.name}, processes", disable=None, leave=False):
            row = {"processes": count, **time_steps(model, case, count, args)}
            fewest = (rows or [row])[0]
            row["images_per_second"] = count * case.images / row["seconds"]
            row["efficiency"] = fewest.get("unsynchronised", fewest["seconds"]) / row["seconds"]
            rows.append(row)
        title = f"{model.name}, {case} per process, on {args.device}, {args.threads or 1} threads per process"
        report.add(title, COLUMNS, rows, model=model.name, **vars(case))


def time_steps(model: Model, case: Case, processes: int, args: argparse.Namespace) -> measure.Row:
    """Start the processes, each with its own GPU on ``cuda``, and time their steps.

    Returns:
        ``seconds`` of a step. For several processes also the seconds of a step ``unsynchronised``, of one
        ``all_reduce`` of as many bytes as the gradients have, and ``visible``, the part of it that a step does not
        hide. All are medians over rounds, of the slowest process.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (processes, model, case, args, folder), nprocs=processes)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _process(rank: int, processes: int, model: Model, case: Case, args: argparse.Namespace, folder: str) -> None:
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    prepare(device, args.threads or 1)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    prepared = Prepared(model, EAGER, case, device)
    calls: dict[str, Callable[[], object]] = {"seconds": prepared.step}
    if processes > 1:
        prepared.forward = parallel = DistributedDataParallel(  # as in the trainer
            prepared.module,
            device_ids=[rank] if on_gpu else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        gradients = torch.zeros(sum(p.numel() for p in prepared.module.parameters()), device=device)

        def unsynchronised() -> None:
            with parallel.no_sync():
                prepared.step()

        calls |= {"unsynchronised": unsynchronised, "all_reduce": lambda: dist.all_reduce(gradients)}
    found = _medians(calls, device, args.seconds)
    if processes > 1:
        found["visible"] = found["seconds"] - found["unsynchronised"]
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    # A gloo thread releases the tensor of an all-reduce shortly after the call returns, and needs the interpreter's
    # lock for this. Destroying the process group waits for the thread while holding the lock, and sometimes hangs.
    os._exit(0)


def _medians(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of the slowest process; the calls take turns, for about ``seconds`` in all."""

    def clock(call: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        call()
        measure.synchronise(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    _, first = ([clock(call) for call in calls.values()] for _ in range(2))  # warms up, and measures once
    rounds = max(measure.FEWEST_ROUNDS, int(seconds / sum(first)))  # the same in all processes
    times = [first, *([clock(call) for call in calls.values()] for _ in range(rounds - 1))]
    return dict(zip(calls, map(statistics.median, zip(*times, strict=True)), strict=True))
