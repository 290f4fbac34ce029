"""One trial: every competitor on one case and dtype, forward and forward+backward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from .. import backends
from . import competitors, measure
from .cases import Case
from .competitors import DEFINITION, Call, Competitor

MODES = {"forward": False, "forward+backward": True}
MEMORY_COPY_BYTES = 512 * 2**20  # more than any cache holds
MEMORY_COPY, OWN_COPY = "memory copy", "copy of its own size"
CPU_REFERENCE_ELEMENTS = 2**23  # a matter of patience
REFERENCE_BYTES = 256  # of memory per element, twice what the float64 definition and its gradients take


@dataclass(frozen=True)
class Choices:
    """Which competitors take part, and how long they are timed."""

    device: torch.device
    backends: Sequence[str] = backends.BACKENDS
    published: bool = True
    compiled: Sequence[str] = ()  # globs of the cases
    seconds: float = 5.0  # per case, dtype and mode

    def absent(self, dtype: torch.dtype) -> dict[str, str]:
        """The chosen backends that cannot be timed, with the reason."""
        reasons = {name: competitors.why_not(name, self.device, dtype) for name in self.backends}
        return {name: reason for name, reason in reasons.items() if reason is not None}


class Bench:
    """The instruments of a run, and the trials made with them."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.device = choices.device
        self.clock = measure.clock_for(self.device)
        self.memory_copy = measure.copy_of(MEMORY_COPY_BYTES, self.device)

    def peak(self) -> float:
        """Operations per second of a float32 matrix product."""
        return measure.matmul_peak(self.clock, self.device)

    def run(self, case: Case, dtype: torch.dtype) -> list[dict[str, Any]]:
        """Results of both modes, ready for JSON: see ``_result``."""
        entrants = self._entrants(case, dtype)
        errors = self._errors(case, dtype, entrants)
        results = [self._time(case, dtype, mode, entrants, errors) for mode in MODES]
        torch.compiler.reset()  # compiled for this shape alone
        return results

    def _entrants(self, case: Case, dtype: torch.dtype) -> list[Competitor]:
        absent = self.choices.absent(dtype)
        entrants = competitors.native(case, [name for name in self.choices.backends if name not in absent])
        if any(fnmatchcase(case.name, glob) for glob in self.choices.compiled):
            entrants.append(competitors.compiled(case))
        if self.choices.published:
            entrants += competitors.published(case, self.device, dtype)
        return entrants

    def _errors(self, case: Case, dtype: torch.dtype, entrants: Sequence[Competitor]) -> dict[str, Any]:
        """Per competitor and mode the worst error against the float64 definition; a message where it failed.

        Large cases are checked on fewer images or channels, of the full size: see ``Case.cropped``.
        """
        elements = CPU_REFERENCE_ELEMENTS
        if self.device.type == "cuda":
            elements = torch.cuda.get_device_properties(self.device).total_memory // REFERENCE_BYTES
        case = case.cropped(elements)
        inputs, grad_output = case.inputs(self.device, dtype), case.grad_output(self.device, dtype)
        names = ["output", *(f"gradient of {name}" for name in inputs)]
        doubles = {name: x.double() for name, x in inputs.items()}
        reference = competitors.definition(case).bind(case, doubles, grad_output.double(), backward=True)()

        errors: dict[str, Any] = {}
        for entrant in entrants:
            try:
                found = entrant.bind(case, inputs, grad_output, backward=True)()
                errors[entrant.name] = {
                    mode: measure.worst_error(names[:count], found[:count], reference[:count])
                    for mode, count in zip(MODES, (1, len(names)), strict=True)
                }
            except Exception as failure:  # whatever goes wrong in one is no reason to stop the others
                errors[entrant.name] = measure.failure_text(failure)
        return errors

    def _time(
        self, case: Case, dtype: torch.dtype, mode: str, entrants: Sequence[Competitor], errors: Mapping[str, Any]
    ) -> dict[str, Any]:
        inputs, grad_output = case.inputs(self.device, dtype), case.grad_output(self.device, dtype)
        calls: dict[str, Call] = {}
        rows: dict[str, dict[str, Any]] = {}
        for entrant in entrants:
            rows[entrant.name] = row = {"competitor": entrant.name, "note": entrant.note}
            if isinstance(errors[entrant.name], str):
                row["failure"] = errors[entrant.name]
                continue
            error, where = errors[entrant.name][mode]
            if math.isinf(error):
                row["failure"] = f"{where} is not finite"
                continue
            row |= {"error": error, "error_in": where}
            try:
                call = entrant.bind(case, inputs, grad_output, MODES[mode])
                call()  # compiles and warms up
                row["peak_bytes"] = measure.peak_memory(call, self.device)
                calls[entrant.name] = call
            except Exception as failure:
                row["failure"] = measure.failure_text(failure)

        own_size = dtype.itemsize * next(iter(inputs.values())).numel()
        copies = {MEMORY_COPY: MEMORY_COPY_BYTES, OWN_COPY: own_size}
        calls |= {MEMORY_COPY: self.memory_copy, OWN_COPY: measure.copy_of(own_size, self.device)}
        timings = measure.interleave(calls, self.clock, self.choices.seconds)
        return _result(case, dtype, mode, rows, copies, timings)


def _result(
    case: Case,
    dtype: torch.dtype,
    mode: str,
    rows: Mapping[str, dict[str, Any]],
    copies: Mapping[str, int],
    timings: Mapping[str, measure.Timing],
) -> dict[str, Any]:
    """Times in seconds, bandwidths in bytes per second, shares and errors as fractions."""
    size, operations = case.compulsory_bytes(dtype, MODES[mode]), case.operations(MODES[mode])
    yardsticks = {
        name: timings[name]._asdict() | {"bytes": moved, "bandwidth": 2 * moved / timings[name].median}
        for name, moved in copies.items()
    }
    definition = timings.get(DEFINITION)
    for name, row in rows.items():
        if name not in timings:
            continue
        bandwidth = size / timings[name].median
        row |= timings[name]._asdict()
        row["bandwidth"] = bandwidth
        row |= {f"share of {copy}": bandwidth / yardsticks[copy]["bandwidth"] for copy in copies}
        row["faster_than_definition"] = definition.median / timings[name].median if definition else None
    return {
        "case": asdict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "bytes": size,
        "operations": operations,
        "copies": yardsticks,
        "rows": list(rows.values()),
    }
