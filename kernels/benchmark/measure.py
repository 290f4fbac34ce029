"""How it is measured: time, peak memory, FLOPs, and the error against float64."""

import ctypes
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .. import backends

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU holds
COPY_BYTES = 512 * 2**20  # more than any cache holds
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
LONG_CALL = 0.1  # seconds; what takes longer has a working set that no cache keeps
WARM_UP = {"cpu": 1, "cuda": 3}  # calls; on a GPU libraries choose algorithms, and CUDA graphs are recorded
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
TRAINING_PASSES = 3  # a backward pass counts as two forward passes, as is customary; nothing for what is recomputed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in glibc's malloc.h

Call = Callable[[], Any]
Row = dict[str, Any]
Clock = Callable[[Call], float]  # seconds of one call


class WallClock:
    """Times a call from idle to idle, launching included, with its data as warm as the caches can hold it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Call) -> float:
        seconds = self._once(call)
        return self._once(call) if seconds < LONG_CALL else seconds

    def _once(self, call: Call) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return time.perf_counter() - start


class CudaClock:
    """Times a call on the GPU, between two events, its data out of the L2 cache.

    Flushing the cache takes longer than launching the call, so that the GPU then runs it without gaps, as in
    training, where the host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._flush(1)
        self.flush_seconds = self._elapsed(lambda: self._flush(10)) / 10

    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        launch = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        self._flush(1 + math.ceil(1.5 * launch / self.flush_seconds))
        return self._elapsed(call)

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self.scratch.zero_()

    def _elapsed(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def operator_clock(device: torch.device) -> Clock:
    """The clock for calls that are parts of something larger."""
    return CudaClock(device) if device.type == "cuda" else WallClock(device)


def interleave(calls: Mapping[str, Call], clock: Clock, seconds: float) -> dict[str, Row]:
    """Time all calls in turn, round by round, so that drifts of the machine hit all alike.

    Args:
        calls: by name; each has run before.
        clock: times one call.
        seconds: aimed at in all; a few rounds are run however long they take.

    Returns:
        By name, ``seconds`` (the median), the quartiles ``lower`` and ``upper`` and the number of ``rounds``; of a call
        that fails its ``outcome``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Row] = {}
    rounds, start = 0, time.perf_counter()
    while times and rounds < MOST_ROUNDS and (rounds <= FEWEST_ROUNDS or time.perf_counter() - start < seconds):
        for name in list(times):
            try:
                times[name].append(clock(calls[name]))
            except Exception as failure:  # is no reason to stop the others
                found[name] = outcome(failure)
                del times[name]
        rounds += 1
    for name, (_, *elapsed) in times.items():  # the first round warms up
        lower, median, upper = statistics.quantiles(elapsed, n=4, method="inclusive")
        found[name] = dict(seconds=median, lower=lower, upper=upper, rounds=rounds - 1)
    return found


class NotRunError(Exception):
    """Something cannot take part, which is no failure."""


@dataclass
class Entry:
    """What takes part in a trial.

    Attributes:
        make: makes the call, which returns the tensors that it computes; may raise NotRunError.
        facts: for its row, which ``make`` may add to.
        has_memory: whether its peak memory can be measured.
    """

    name: str
    make: Callable[[], Call]
    facts: Row = field(default_factory=dict)
    has_memory: bool = True


class Trial:
    """Runs entries on the same case: peak memory of each alone, then all timed in turn.

    Args:
        seconds: of timing per case, all entries together.
        deadline: of ``time.perf_counter()``; no entry is made after it.
    """

    def __init__(self, device: torch.device, clock: Clock, seconds: float, deadline: float = math.inf) -> None:
        self.device, self.clock, self.seconds, self.deadline = device, clock, seconds, deadline

    def is_late(self) -> bool:
        """Whether nothing more is to be started."""
        return time.perf_counter() > self.deadline

    def run(self, entries: Sequence[Entry]) -> list[Row]:
        """One row per entry: its name, facts, ``peak_bytes``, and what ``interleave`` finds.

        One that cannot run leaves the others, and says why: in ``not_run`` if memory or time do not suffice, in
        ``failure`` for all else, also for results that are not finite; and for the table in ``note``.
        """
        rows: dict[str, Row] = {}
        calls: dict[str, Call] = {}
        for entry in entries:
            row = rows[entry.name] = {"name": entry.name, **entry.facts}
            try:
                if self.is_late():
                    raise NotRunError("out of time")
                call = entry.make()
                row |= entry.facts
                for _ in range(WARM_UP[self.device.type]):
                    _check(call())
                row["peak_bytes"] = peak_memory(call, self.device) if entry.has_memory else None
                calls[entry.name] = call
            except Exception as failure:  # is no reason to stop the others
                row |= outcome(failure)
            release(self.device)
        for name, found in interleave(calls, self.clock, self.seconds).items():
            rows[name] |= found
        for row in rows.values():
            if "failure" in row or "not_run" in row:
                row["note"] = f"failed: {row['failure']}" if "failure" in row else f"not run: {row['not_run']}"
        return list(rows.values())


def memory_copy(device: torch.device) -> Call:
    """A call that copies ``COPY_BYTES``: twice as many are read and written."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> tuple[()]:
        target.copy_(source)
        return ()

    return copy


def matmul_peak(clock: Clock, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a matrix product, best of five."""
    size = PEAK_SIZES[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(5))


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
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def dry_run(function: Callable[..., Tensor], *tensors: Tensor, **named: Tensor) -> tuple[Tensor, int]:
    """A fake of the output, with shape and dtype alone, and the FLOPs of one call, a multiply-add counted as two.

    Nothing is computed. PyTorch's counter knows convolutions and matrix products, and this package's operators by the
    formulas that they register; element-wise operations and norms count nothing.
    """
    counter = FlopCounterMode(display=False)
    # An operator is counted as one, also where its reference implementation would run.
    whole = patch.object(backends, "reference_serves", return_value=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter, torch.no_grad(), whole:
        output = function(*map(fake.from_tensor, tensors), **{name: fake.from_tensor(x) for name, x in named.items()})
    return output, counter.get_total_flops()


def worst_error(names: Iterable[str], actual: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[float, str]:
    """Largest absolute error relative to the largest magnitude expected, over all tensors, and the tensor it is in."""
    errors = {}
    for name, x, reference in zip(names, actual, expected, strict=True):
        error = (x.double() - reference).abs().max() / reference.abs().max()
        errors[name] = error.item() if error.isfinite() else math.inf
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def outcome(failure: Exception) -> Row:
    """``not_run`` if memory does not suffice, else ``failure``: the type and the first line of an exception."""
    if isinstance(failure, NotRunError):
        return {"not_run": str(failure)}
    # PyTorch has an exception of its own for GPUs alone.
    if isinstance(failure, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(failure):
        return {"not_run": "out of memory"}
    lines = str(failure).strip().splitlines()
    return {"failure": f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__}


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def _check(results: Tensor | Iterable[Tensor]) -> None:
    tensors = [results] if isinstance(results, Tensor) else results
    if not all(x.isfinite().all() for x in tensors):
        raise FloatingPointError("the output is not finite")
