"""A process that stalls, but lives, is named by the others."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.stalls import note_progress, stalls_watched


def hang() -> None:
    time.sleep(60)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def run(rank: int, folder: Path, stall: Callable[[], None] | None) -> None:
    """One of three processes, of which the second stalls before it has loaded a batch, or all wait for each other."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=3)
    with stalls_watched(Process(rank, 3, torch.device("cpu")), minutes=0.04):
        note_progress()
        time.sleep(0.5)  # slow, but not stalled
        dist.barrier()
        if rank == 1 and stall:
            stall()
        note_progress()
        if stall:
            dist.barrier()
        hang()


@pytest.mark.parametrize(
    ("stall", "line"),
    [
        (hang, "rank 1 waiting for data or a checkpoint, probably from a file system that does not answer"),
        (stop, "rank 1 stopped, or on a machine that does not answer"),
        (None, "ranks 0, 1, 2 waiting for each other or a GPU, probably because of the network or a driver"),
    ],
)
def test_the_stalled_process_is_named(
    stall: Callable[[], None] | None, line: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    start = time.monotonic()
    context = torch.multiprocessing.start_processes(run, (tmp_path, stall), nprocs=3, join=False, start_method="fork")
    first, *others = context.processes
    first.join(20)
    assert first.exitcode == 2 and time.monotonic() - start > 2.4
    for process in others:  # as a launcher would
        process.kill()
        process.join()
    assert capfd.readouterr().err == f"error: no progress in 0.04 minutes: {line}\n"
