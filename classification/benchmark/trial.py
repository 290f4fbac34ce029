"""One trial: all competitors on the same images, round by round, in inference or in a training step."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.benchmark import measure
from .competitors import (
    COMPILED,
    CUDAGRAPH,
    EAGER,
    LAYOUT_IMAGES,
    TRAIN,
    Call,
    Case,
    Competitor,
    build,
    form_of,
)
from .energy import Counter, NoCounterError, counter_for, joules_per_call
from .roster import BASE_RESOLUTION, Model

WARM_UP = {"cpu": 1, "cuda": 3}  # calls; on a GPU libraries choose algorithms, and CUDA graphs are recorded
MOST_COMPILED = 256  # models that torch.compile keeps at once; it gives up after 8 otherwise
NOT_FINITE = "the output is not finite"


@dataclass(frozen=True)
class Choices:
    """Who takes part in which form, and how long it is timed.

    Attributes:
        forms: of ``FORMS``. A model without ``fuse()``, or in training, takes part in the form without it; the
            published formulation always as it is written.
        seconds: of timing per case.
        same_pixels: of images of other sizes than 224x224 take as many as have the same pixels, at least one.
        deadline: of ``time.perf_counter()``; nothing more is started after it.
    """

    device: torch.device
    models: Sequence[Model]
    forms: Sequence[str] = (EAGER,)
    seconds: float = 5.0
    same_pixels: bool = False
    deadline: float = float("inf")

    def entrants(self, mode: str) -> list[tuple[Model, str]]:
        """The models with the forms that they have in that mode, each once."""
        return list(dict.fromkeys((model, form_of(model, form, mode)) for model in self.models for form in self.forms))


class Bench:
    """The instruments of a run, and the trials made with them."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.device = choices, choices.device
        if set(choices.forms) & set(COMPILED):
            torch._dynamo.config.recompile_limit = MOST_COMPILED
        self.clock = GpuClock(self.device) if self.device.type == "cuda" else measure.cpu_clock
        self.counter: Counter | None = None
        self.energy = ""  # what is measured, or why nothing is
        try:
            self.counter = counter_for(self.device)
            self.energy = self.counter.source
        except NoCounterError as reason:
            self.energy = f"not measured: {reason}"
        self._peaks: dict[str, float] = {}

    def _peak(self, dtype: str) -> float:
        """Operations per second of a matrix product of that dtype, measured now: the most that the run has seen."""
        now = measure.matmul_peak(measure.clock_for(self.device), self.device, getattr(torch, dtype))
        self._peaks[dtype] = max(now, self._peaks.get(dtype, 0.0))
        return self._peaks[dtype]

    def run(self, mode: str, dtype: str, resolution: int, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Results for each batch, ready for JSON: see ``_row`` for a competitor's part. They end at the deadline."""
        if self._is_late():
            return
        few = min(max(batches), LAYOUT_IMAGES[self.device.type])
        few = max(1, few * BASE_RESOLUTION**2 // max(resolution, BASE_RESOLUTION) ** 2)
        trial = Case(mode, dtype, resolution, few, few)
        competitors = [
            build(model, form, trial, self.device, self.clock) for model, form in self.choices.entrants(mode)
        ]
        for batch in batches:
            if self._is_late():
                break
            images = max(1, batch * BASE_RESOLUTION**2 // resolution**2) if self.choices.same_pixels else batch
            case = Case(mode, dtype, resolution, batch, images)
            peak = self._peak(dtype)
            yield {**asdict(case), "peak": peak, "rows": self._rows(case, competitors, peak)}
            torch.compiler.reset()  # compiled for this shape alone
        competitors.clear()
        self._release()

    def _is_late(self) -> bool:
        return time.perf_counter() > self.choices.deadline

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, case: Case, competitors: Sequence[Competitor], peak: float) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for competitor in competitors:
            rows[competitor.name] = {"competitor": competitor.name} | dict(
                model=competitor.model.name, form=competitor.form, family=competitor.model.family
            )
        # Those that need no compiler come first, in case time runs out.
        for competitor in sorted(competitors, key=lambda competitor: competitor.form in COMPILED):
            row = rows[competitor.name]
            if competitor.refusal or self._is_late():
                row["not_run"] = competitor.refusal or "out of time"
                continue
            try:
                call = competitor.step(case)
                row |= self._prepare(call, competitor)
                calls[competitor.name] = call
            except torch.OutOfMemoryError:
                row["not_run"] = "out of memory"
                if competitor.module is not None:
                    competitor.module.zero_grad()
            except Exception as failure:
                row["failure"] = measure.failure_text(failure)
            self._release()

        calls = {name: calls[name] for name in rows if name in calls}  # in turns, in the order of the table
        try:
            timings = self._time(calls, rows)
        except torch.OutOfMemoryError:  # each has run alone, but not beside what the others keep
            for name in calls:
                rows[name]["not_run"] = "out of memory beside the others: choose fewer --models"
            return list(rows.values())
        by_name = {competitor.name: competitor for competitor in competitors}
        for name, timing in timings.items():
            row = rows[name]
            row |= self._row(case, by_name[name], timing, peak)
            try:
                row["joules_per_image"] = self._joules(calls[name], case, len(timings))
                if not calls[name]().isfinite().all():
                    row["failure"] = NOT_FINITE
            except Exception as failure:
                row["failure"] = measure.failure_text(failure)
        return list(rows.values())

    def _time(self, calls: Mapping[str, Call], rows: Mapping[str, dict[str, Any]]) -> dict[str, measure.Timing]:
        """Timings of the calls in turn. If one raises, its row says so, and the others are timed without it.

        Raises:
            torch.OutOfMemoryError: from any of the calls.
        """
        current = ""

        def watched(name: str, call: Call) -> Call:
            def run() -> Tensor:
                nonlocal current
                current = name
                return call()

            return run

        left = {name: watched(name, call) for name, call in calls.items()}
        while left:
            try:
                return measure.interleave(left, self.clock, self.choices.seconds)
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:  # the clock's own come right after the call, as when a GPU reports late
                rows[current]["failure"] = measure.failure_text(failure)
                del left[current]
        return {}

    def _prepare(self, call: Call, competitor: Competitor) -> dict[str, Any]:
        """Compile, warm up, look at the output, and measure memory, in bytes."""
        for _ in range(WARM_UP[self.device.type]):
            output = call()
        if not output.isfinite().all():
            raise FloatingPointError(NOT_FINITE)
        del output
        notes, peak = list(competitor.notes), None
        if competitor.form == CUDAGRAPH:
            notes.append("peak not measured: CUDA graphs share one pool")
        else:
            peak = measure.peak_memory(call, self.device)
        return {
            "weight_bytes": competitor.weights,
            "optimizer_bytes": competitor.optimizer_state,
            "peak_bytes": peak,
            "note": "; ".join(notes),
        }

    def _joules(self, call: Call, case: Case, calls: int) -> float | None:
        if self.counter is None:
            return None
        return joules_per_call(call, self.counter, self.device, self.choices.seconds / calls) / case.images

    @staticmethod
    def _row(case: Case, competitor: Competitor, timing: measure.Timing, peak: float) -> dict[str, Any]:
        """Times in seconds, of one call; ``flops_per_image`` and ``mfu`` count what the model asks for."""
        flops = competitor.flops * (measure.TRAINING_PASSES if case.mode == TRAIN else 1)
        return timing._asdict() | {
            "seconds_per_image": timing.median / case.images,
            "images_per_second": case.images / timing.median,
            "seconds_per_pixel": timing.median / (case.images * case.resolution**2),
            "accuracy": competitor.model.accuracy,
            "flops_per_image": flops,
            "mfu": flops * case.images / timing.median / peak,
        }


class GpuClock:
    """Times a call as its user sees it, from idle GPU to idle GPU, launching included, right after an untimed call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object], _: float) -> tuple[float, float]:
        seconds, launch = self._wall(call)
        if seconds < measure.LONG_CALL:
            seconds, launch = self._wall(call)
        return seconds, launch

    def _wall(self, call: Callable[[], object]) -> tuple[float, float]:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start, launched - start
