"""How the benchmarks measure time, peak memory, bytes and FLOPs."""

import ctypes
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .. import backends

FLUSH_BYTES = 256 * 2**20  # larger than the L2 cache of any GPU
COPY_BYTES = 512 * 2**20  # larger than any cache
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
CYCLES_PER_SECOND = 3e9  # no GPU has a faster clock
LONG_CALL = 0.1  # seconds; the working set of longer calls does not stay in a cache
WARM_UP = {"cpu": 1, "cuda": 3}  # calls; on a GPU libraries choose algorithms, and CUDA graphs are recorded
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}  # sides of the square matrices whose product is timed
TRAINING_PASSES = 3  # by convention a backward pass counts as two forward passes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in glibc's malloc.h

Call = Callable[[], Any]
Row = dict[str, Any]
Clock = Callable[[Call], float]  # returns the seconds of one call
Make = Callable[[Row], Call]


def wall_clock(device: torch.device) -> Clock:
    """Time a call from idle to idle, including its launch, with as much of its data in the caches as fits."""

    def once(call: Call) -> float:
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        return time.perf_counter() - start

    def clock(call: Call) -> float:
        seconds = once(call)
        return once(call) if seconds < LONG_CALL else seconds

    return clock


def operator_clock(device: torch.device) -> Clock:
    """The clock for parts of a model: on a GPU between two events, with the data out of the L2 cache.

    The GPU sleeps for longer than the host needs to launch the call. It then runs the call without gaps, as in
    training, where the host runs ahead.
    """
    if device.type == "cpu":
        return wall_clock(device)
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Call) -> float:
        begin = time.perf_counter()
        call()
        launch = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        torch.cuda._sleep(round(1.5 * launch * CYCLES_PER_SECOND))
        scratch.zero_()  # flushes the cache
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return clock


class NotRunError(Exception):
    """A model or implementation cannot be measured here; this does not count as a failure."""


@dataclass(frozen=True)
class Trial:
    """Measures the peak memory of calls one by one, then times all of them in turn.

    Attributes:
        clock: times one call.
        seconds: budget for timing all calls together; a few rounds are run even if they take longer.
        deadline: value of ``time.perf_counter()`` after which nothing is started.
    """

    device: torch.device
    clock: Clock
    seconds: float
    deadline: float = math.inf

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline

    def run(self, makers: Iterable[tuple[str, Make]]) -> list[Row]:
        """Measure calls, and leave out those that fail.

        Args:
            makers: pairs of a name and a function that makes the call. The function gets the row to add facts to, and
                sets ``peak_bytes`` to None if the memory cannot be measured. The call returns the tensors it computes.

        Returns:
            One row per call: ``name``, its facts, ``peak_bytes``, and the keys of ``interleave`` or ``outcome``.
        """
        rows: dict[str, Row] = {}
        calls: dict[str, Call] = {}
        for name, make in makers:
            row = rows[name] = {"name": name}
            try:
                if self.is_late():
                    raise NotRunError("out of time")
                call = make(row)
                for _ in range(WARM_UP[self.device.type]):
                    results = call()
                    if not all(x.isfinite().all() for x in ([results] if isinstance(results, Tensor) else results)):
                        raise FloatingPointError("the output is not finite")
                    del results
                if "peak_bytes" not in row:
                    row["peak_bytes"] = peak_memory(call, self.device)
                calls[name] = call
            except Exception as failure:  # the others go on
                row |= outcome(failure)
            release(self.device)
        for name, found in self.interleave(calls).items():
            rows[name] |= found
        return list(rows.values())

    def interleave(self, calls: Mapping[str, Call]) -> dict[str, Row]:
        """Time all calls in turn, round by round, so that drift in machine speed affects all equally.

        Returns:
            By name, ``seconds`` (the median), the quartiles ``lower`` and ``upper``, and the number of ``rounds``; for
            a call that fails, its ``outcome``.
        """
        times: dict[str, list[float]] = {name: [] for name in calls}
        found: dict[str, Row] = {}
        rounds, end = 0, time.perf_counter() + self.seconds
        while times and rounds < MOST_ROUNDS and (rounds <= FEWEST_ROUNDS or time.perf_counter() < end):
            for name in list(times):
                try:
                    times[name].append(self.clock(calls[name]))
                except Exception as failure:  # the others go on
                    found[name] = outcome(failure)
                    del times[name]
            rounds += 1
        for name, (_, *elapsed) in times.items():  # the first round warms up
            lower, median, upper = statistics.quantiles(elapsed, n=4, method="inclusive")
            found[name] = dict(seconds=median, lower=lower, upper=upper, rounds=rounds - 1)
        return found


def outcome(failure: Exception) -> Row:
    """The reason, in ``not_run`` if time or memory ran out, else in ``failure``; for tables also in ``note``."""
    reason = str(failure)
    if isinstance(failure, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in reason:  # on a GPU; on a CPU
        failure = NotRunError(reason := "out of memory")
    if isinstance(failure, NotRunError):
        return {"not_run": reason, "note": f"not run: {reason}"}
    reason = f"{type(failure).__name__}: {reason.strip()}".splitlines()[0]
    return {"failure": reason, "note": f"failed: {reason}"}


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds; best of five."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / min(clock(lambda: target.copy_(source)) for _ in range(5))


def matmul_peak(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product; best of five."""
    size = PEAK_SIZES[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(5))


def compulsory_bytes(inputs: Iterable[Tensor], output: Tensor, gradients: Iterable[Tensor] | None = None) -> int:
    """The fewest bytes that can move: each input is read once, the output is written once.

    With a backward pass, given the tensors that get ``gradients``, the inputs and the gradient of the output are also
    read, and one gradient per tensor is written. What an implementation saves or recomputes does not count.
    """
    once = sum(x.nbytes for x in (*inputs, output))
    return once if gradients is None else 2 * once + sum(x.nbytes for x in gradients)


def peak_memory(call: Call, device: torch.device) -> int:
    """Peak bytes of tensors alive at once during a call, results included, inputs not.

    On a CPU it is summed over PyTorch's own record of its allocations. This is exact, but does not see memory that a
    library allocates for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no warning about a missing GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        results = call()
    del results
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def dry_run(function: Callable[..., Tensor], *tensors: Tensor, **named: Tensor) -> tuple[Tensor, int]:
    """A fake output, which has only a shape and a dtype, and the FLOPs of one call. A multiply-add counts as two.

    Nothing is computed. PyTorch's counter counts convolutions and matrix products, and this package's operators by the
    formulas that they register; element-wise operations and norms count as zero.
    """
    counter = FlopCounterMode(display=False)
    formulas = backends.custom_operators_only()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter, torch.no_grad(), formulas:
        output = function(*map(fake.from_tensor, tensors), **{name: fake.from_tensor(x) for name, x in named.items()})
    return output, counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process, as PyTorch does on a GPU; other C libraries are left as they are.

    Otherwise glibc returns large buffers to the system and gets fresh pages for the next ones. Clearing these would be
    timed with every operator that allocates its result.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
