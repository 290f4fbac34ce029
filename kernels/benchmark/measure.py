"""How it is measured: time, copy bandwidth, peak memory, and the error against float64."""

import ctypes
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU holds
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
LONG_CALL = 0.1  # seconds; what takes longer has a working set that no cache keeps
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}  # of the square matrices that measure the compute roof
TRAINING_PASSES = 3  # a backward pass counts as two forward passes, as is customary; nothing for what is recomputed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in glibc's malloc.h

Call = Callable[[], object]


class Timing(NamedTuple):
    """Seconds: quartiles over the rounds, and the host's part of launching the call (the whole call on a CPU)."""

    lower: float
    median: float
    upper: float
    launch: float
    rounds: int


class Clock(Protocol):
    def __call__(self, call: Call, launch: float) -> tuple[float, float]:
        """Seconds of one call and of launching it, the latter expected to take ``launch``."""


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def cpu_clock(call: Call, launch: float) -> tuple[float, float]:
    """Time a call whose data is as warm as the caches can hold it: an untimed call comes right before."""
    seconds = _wall_seconds(call)
    if seconds < LONG_CALL:
        seconds = _wall_seconds(call)
    return seconds, seconds


class CudaClock:
    """Times a call on the GPU, between two events, its data out of the L2 cache.

    Flushing the cache takes longer than launching the call, so that the GPU then runs it without gaps, as in
    training, where the host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._flush(1)
        self.flush_seconds, _ = self._elapsed(lambda: self._flush(10))
        self.flush_seconds /= 10

    def __call__(self, call: Call, launch: float) -> tuple[float, float]:
        torch.cuda.synchronize(self.device)
        self._flush(1 + math.ceil(1.5 * launch / self.flush_seconds))
        return self._elapsed(call)

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self.scratch.zero_()

    def _elapsed(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch = _wall_seconds(call)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3, launch


def interleave(calls: Mapping[str, Call], clock: Clock, seconds: float) -> dict[str, Timing]:
    """Time all calls in turn, round by round, so that drifts of the machine hit all alike.

    Args:
        calls: by name; each has run before.
        clock: times one call.
        seconds: aimed at in all; a few rounds are run however long they take.
    """
    start = time.perf_counter()
    launches = {name: clock(call, 0.0)[1] for name, call in calls.items()}
    round_seconds = time.perf_counter() - start
    rounds = min(max(FEWEST_ROUNDS, int(seconds / round_seconds)), MOST_ROUNDS)

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            elapsed, launch = clock(call, launches[name])
            times[name].append(elapsed)
            launches[name] = min(launches[name], launch)  # a full queue makes a launch wait
    return {
        name: Timing(*statistics.quantiles(elapsed, n=4, method="inclusive"), launches[name], rounds)
        for name, elapsed in times.items()
    }


def copy_of(size: int, device: torch.device) -> Call:
    """A call that copies a buffer of ``size`` bytes onto another: the yardstick moves twice as many bytes."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def matmul_peak(clock: Clock, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a matrix product: the compute roof, best of five."""
    size = PEAK_SIZES[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    seconds = min(clock(lambda: torch.mm(a, b, out=out), 0.0)[0] for _ in range(5))
    return 2 * size**3 / seconds


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes of tensors alive at once during a call, at the peak, beyond those that were there before.

    Results count, inputs do not. On a CPU the sum over PyTorch's own record of its allocations, which is exact, but
    does not see memory that a library takes for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would complain that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        results = call()
    del results
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = [event["args"] for event in events if event.get("name") == "[memory]"]
    alive = peak = 0
    for allocation in sorted(allocations, key=lambda args: args["Ev Idx"]):
        alive += allocation["Bytes"]
        peak = max(peak, alive)
    return peak


def worst_error(names: Iterable[str], actual: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[float, str]:
    """Largest absolute error relative to the largest magnitude expected, over all tensors, and the tensor it is in."""
    errors = {}
    for name, x, reference in zip(names, actual, expected, strict=True):
        error = (x.double() - reference).abs().max() / reference.abs().max()
        errors[name] = error.item() if error.isfinite() else math.inf
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def failure_text(failure: Exception) -> str:
    """The type and the first line of an exception."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory, as PyTorch does on GPUs; whether it has understood (glibc does).

    Else it returns large buffers to the system and gets them back as fresh pages, the clearing of which would
    be timed with every operator that allocates its result.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


def _wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
