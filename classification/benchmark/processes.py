"""Data-parallel training steps over the processes of this machine, synchronised and not."""

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

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import Column, Report
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


def add_tables(report: Report, models: Sequence[Model], case: Case, device_type: str, args: argparse.Namespace) -> None:
    """One table per model, with a row per number of processes; efficiency is relative to the fewest.

    To their step without all-reduce, where there are several.
    """
    for model in models:
        rows: list[measure.Row] = []
        for count in sorted(set(args.processes)):
            row = {"processes": count, **time_steps(model, case, count, device_type, args)}
            single = (rows or [row])[0]
            row["images_per_second"] = count * case.images / row["seconds"]
            row["efficiency"] = single.get("unsynchronised", single["seconds"]) / row["seconds"]
            rows.append(row)
        title = f"{model.name}  {case} per process, on {device_type}, {args.threads or 1} threads per process"
        report.add(title, COLUMNS, rows, model=model.name, **vars(case))


def time_steps(model: Model, case: Case, processes: int, device_type: str, args: argparse.Namespace) -> measure.Row:
    """Start the processes, with a GPU each on ``cuda``, and time their steps.

    Returns:
        ``seconds`` of a step; of several processes also that of one that is ``unsynchronised``, of one ``all_reduce``
        of as many bytes as the gradients have, alone, and what of it is ``visible``. Medians of the slowest process
        of each round. ``gradient_bytes``.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (processes, model, case, device_type, args, folder)
        torch.multiprocessing.spawn(_process, work, nprocs=processes)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def _process(
    rank: int, processes: int, model: Model, case: Case, device_type: str, args: argparse.Namespace, folder: str
) -> None:
    on_gpu = device_type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(args.threads or 1)
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    elif args.keep_freed_memory:
        measure.keep_freed_memory()
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if on_gpu else "gloo", meeting, rank=rank, world_size=processes)
    prepared = Prepared(model, EAGER, case, device, measure.WallClock(device))
    size = sum(p.numel() * p.itemsize for p in prepared.module.parameters() if p.requires_grad)
    calls: dict[str, Callable[[], object]] = {"seconds": prepared.step}
    if processes > 1:
        prepared.forward = parallel = DistributedDataParallel(  # as in the trainer
            prepared.module,
            device_ids=[rank] if on_gpu else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        flat = torch.zeros(size // 4, device=device)

        def unsynchronised() -> None:
            with parallel.no_sync():
                prepared.step()

        calls |= {"unsynchronised": unsynchronised, "all_reduce": lambda: dist.all_reduce(flat)}
    found = {name: statistics.median(times) for name, times in _rounds(calls, device, args.seconds).items()}
    if processes > 1:
        found["visible"] = found["seconds"] - found["unsynchronised"]
    if rank == 0:
        torch.save({**found, "gradient_bytes": size}, Path(folder) / "found.pt")
    dist.barrier()
    # gloo's threads let go of the tensor of an all-reduce a little after it has returned, for which they need the
    # interpreter. Taking the process group down waits for them without releasing it, and now and then for ever.
    os._exit(0)


def _rounds(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Times of the slowest process, calls in turn, until the time is up on any process and each ran three times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start, rounds = time.perf_counter(), 0
    while rounds < measure.FEWEST_ROUNDS or _largest(time.perf_counter() - start, device) < seconds:
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            measure.synchronise(device)
            times[name].append(_largest(time.perf_counter() - begin, device))
        rounds += 1
    return times


def _largest(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()
