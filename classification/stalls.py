"""Notices a run in which no process makes progress, and ends it with one line that names the process at fault."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store

from .distributed import Process, shared_store

_progress = 0  # of this process


def note_progress() -> None:
    """Note that this process has finished some piece of work, such as loading a batch."""
    global _progress
    _progress += 1


@contextmanager
def stalls_watched(process: Process, minutes: float) -> Iterator[None]:
    """End this process, with status 2, once no process of the run has noted progress for this many minutes.

    All processes enter together. A thread compares what they have noted, ten times in this period, because the main
    thread may be blocked in a collective operation.
    """
    if process.world_size == 1:
        yield
        return
    store, finished = shared_store("progress"), threading.Event()
    # The other processes would wait for a missing key, and the store serves one call of a process at a time.
    store.set(str(process.rank), f"0 {_progress}")
    process.barrier()
    threading.Thread(target=_watch, args=(process, store, 60 * minutes, finished), daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def _watch(process: Process, store: Store, seconds: float, finished: threading.Event) -> None:
    looks, since = 0, time.monotonic()
    start: list[list[int]] = []  # looks and progress of each process at that time
    while not finished.wait(seconds / 10):
        looks += 1
        try:
            store.set(str(process.rank), f"{looks} {_progress}")
            now = [[*map(int, store.get(str(rank)).split())] for rank in range(process.world_size)]
        except RuntimeError:  # the host of the store is gone; then collective operations fail, too
            return
        if [progress for _, progress in now] != [progress for _, progress in start]:
            start, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            _end(process, seconds, start, now)


def _end(process: Process, seconds: float, start: list[list[int]], now: list[list[int]]) -> None:
    """Report the stalled processes and end this one.

    The first process that works does so at once. The others wait: the launcher stops them before they repeat the line.
    """
    ranks = range(process.world_size)
    progress = [progress for _, progress in now]
    stalled = [rank for rank in ranks if now[rank][0] == start[rank][0]]
    cause = "stopped, or on a machine that does not answer"
    if not stalled:
        stalled = [rank for rank in ranks if progress[rank] < max(progress)]
        cause = "waiting for data or a checkpoint, probably from a file system that does not answer"
    if not stalled:
        stalled = list(ranks)
        cause = "waiting for each other or a GPU, probably because of the network or a driver"
    if process.rank != min(set(ranks) - set(stalled), default=0):
        time.sleep(5)
    names = f"rank{'s' if len(stalled) > 1 else ''} {', '.join(map(str, stalled))}"
    print(f"error: no progress in {seconds / 60:g} minutes: {names} {cause}", file=sys.stderr, flush=True)
    os._exit(2)
