"""A process that stalls, but lives, is named by the others."""

import itertools
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


CASES = [
    (hang, "rank 1 waiting for data or a checkpoint, probably from a file system that does not answer"),
    (stop, "rank 1 stopped, or on a machine that does not answer"),
    (None, "ranks 0, 1, 2 waiting for each other or a GPU, probably because of the network or a driver"),
]


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


def test_the_stalled_process_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    start, runs = time.monotonic(), []
    for stall, _ in CASES:  # at the same time, since they wait most of it
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        context = torch.multiprocessing.start_processes(run, (folder, stall), nprocs=3, join=False, start_method="fork")
        runs.append(context.processes)
    for first, *_ in runs:
        first.join(20)
    for process in itertools.chain(*runs):  # as a launcher would; also the stopped one
        process.kill()
        process.join()
    assert [first.exitcode for first, *_ in runs] == [2, 2, 2] and time.monotonic() - start > 2.4
    expected = sorted(f"error: no progress in 0.04 minutes: {line}" for _, line in CASES)
    assert sorted(capfd.readouterr().err.splitlines()) == expected
