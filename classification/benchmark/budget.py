"""Where the time goes: compulsory bytes, multiply-adds, the floor they set, the measured time and the gap, per part.

The floor of a part is the longer of the time its compulsory bytes take at the bandwidth of a memory copy and the time
its multiply-adds take at the speed of a large matrix product; both are measured in the same run.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ...kernels.benchmark import measure, options
from ...kernels.benchmark.trial import MEMORY_COPY_BYTES
from ..models.spatial_mamba import SpatialMamba
from .command import VARIANTS, Parser, Report, Table, prepare, timing_record
from .parts import Part, parts_of
from .roster import DROP_PATH_RATE

INFERENCE, FUSED, TRAINING = MODES = ("inference", "fused", "forward+backward")
COLUMNS = ("part", "times", "MB", "GMAC", "floor ms", "set by", "ms", "gap", "of the time")


class Budget:
    """Measures the parts of one classifier.

    Inference has weights and activations of ``dtype``; training has float32 weights, under autocast to ``dtype``.

    Args:
        model: in float32, on ``device``; is put into the mode and, for inference, the dtype measured.
        mode: one of ``MODES``; ``fused`` is inference with ``model.fuse()``.
        seconds: of timing per stage.
    """

    def __init__(
        self, model: SpatialMamba, device: torch.device, dtype: torch.dtype, mode: str, seconds: float
    ) -> None:
        self.device, self.dtype, self.backward, self.seconds = device, dtype, mode == TRAINING, seconds
        self.model = model.train() if self.backward else model.eval().to(dtype)
        if mode == FUSED:
            self.model.fuse()
        self.clock = measure.clock_for(device)
        copy = measure.copy_of(MEMORY_COPY_BYTES, device)
        self.bandwidth = 2 * MEMORY_COPY_BYTES / min(self.clock(copy, 0.0)[0] for _ in range(5))
        self.peak = measure.matmul_peak(self.clock, device, dtype)

    def run(self, batch: int, size: int) -> dict[str, Any]:
        """All parts of all stages, each stage's blocks as a whole, and the whole model; times in seconds.

        Args:
            batch: number of images.
            size: their side in pixels.
        """
        parts = parts_of(self.model, batch, size, size)
        stages = []
        for stage in dict.fromkeys(part.stage for part in parts):
            stages.append(self._stage(stage, [part for part in parts if part.stage == stage]))
        images = [(batch, self.model.in_chans, size, size)]
        whole = self._time({"model": self._bound(self.model, images, self.model.parameters(), is_first=True)})["model"]
        sums = {key: sum(stage["sum"][key] for stage in stages) for key in ("bytes", "macs", "floor", "seconds")}
        return {"stages": stages, "sum": sums, "whole": timing_record(whole)}

    def _stage(self, name: str, parts: Sequence[Part]) -> dict[str, Any]:
        calls = {part.name: self._call_of(part) for part in parts}
        if name.startswith("stage"):
            blocks = self.model.layers[int(name.split()[1]) - 1].blocks
            calls["blocks"] = self._bound(nn.Sequential(*blocks), parts[0].inputs, blocks.parameters())
        timings = self._time(calls)
        rows = []
        for part in parts:
            size, operations = part.compulsory_bytes(self.dtype, self.backward), part.operations(self.backward)
            floors = {"bytes": size / self.bandwidth, "operations": operations / self.peak}
            rows.append(
                {
                    "part": part.name,
                    "count": part.count,
                    "bytes": part.count * size,
                    "macs": part.count * operations // 2,
                    "set_by": max(floors, key=lambda key: floors[key]),
                    "floor": part.count * max(floors.values()),
                    "seconds": part.count * timings[part.name].median,
                    "of_one": timing_record(timings[part.name]),
                }
            )
        sums = {key: sum(row[key] for row in rows) for key in ("bytes", "macs", "floor", "seconds")}
        found = {"stage": name, "parts": rows, "sum": sums}
        if "blocks" in timings:
            found["blocks"] = timing_record(timings["blocks"])
        return found

    def _call_of(self, part: Part) -> measure.Call:
        if part.is_sum and self.backward:
            once = self._bound(part.call, part.inputs, backward=False)

            def both() -> None:
                once()  # the outputs of the branches
                once()  # the gradients at the fork

            return both
        return self._bound(part.call, part.inputs, part.weights, part.takes_images)

    def _bound(
        self,
        function: Callable[..., Tensor],
        shapes: Sequence[Sequence[int]],
        weights: Iterable[Tensor] = (),
        is_first: bool = False,
        backward: bool | None = None,
    ) -> measure.Call:
        """A call of ``function`` on random tensors, with its backward pass where that is asked for.

        Args:
            is_first: leave out the gradients of the inputs.
        """
        backward = self.backward if backward is None else backward
        tensors = [torch.randn(shape, device=self.device).to(self.dtype) for shape in shapes]
        if not backward:

            def forward() -> Tensor:
                with torch.no_grad(), self._precision():
                    return function(*tensors)

            return forward

        weights = [weight for weight in weights if weight.requires_grad]
        sources = weights if is_first else [*(x.requires_grad_() for x in tensors), *weights]
        with self._precision():
            gradient = torch.randn_like(function(*tensors))

        def both_passes() -> tuple[Tensor, ...]:
            with self._precision():
                output = function(*tensors)
            return torch.autograd.grad(output, sources, gradient)

        return both_passes

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.backward and self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def _time(self, calls: Mapping[str, measure.Call]) -> dict[str, measure.Timing]:
        for call in calls.values():
            call()
        return measure.interleave(calls, self.clock, self.seconds)


def build(variant: str) -> SpatialMamba:
    """The classifier with random weights, and in training with the stochastic depth of the other benchmarks."""
    return timm.create_model(f"spatial_mamba_{variant}", drop_path_rate=DROP_PATH_RATE)


def table(title: str, found: Mapping[str, Any]) -> Table:
    """Rows of all stages with their sums, times in milliseconds for all occurrences of a part."""
    total = found["sum"]["seconds"]
    rows = []
    for stage in found["stages"]:
        single = len(stage["parts"]) == 1
        for row in stage["parts"]:
            label = row["part"] if single else f"{stage['stage']}: {row['part']}"
            rows.append(_row(label, str(row["count"]), row, row["set_by"], total))
        if not single:
            rows.append(_row(f"{stage['stage']}: sum", "", stage["sum"], "", total))
    rows.append(_row("sum of all parts", "", found["sum"], "", total))
    whole = {**found["sum"], "seconds": found["whole"]["seconds"]}
    rows.append(_row("the model as a whole", "", whole, "", total))
    return Table(title, COLUMNS, rows)


def blocks_line(found: Mapping[str, Any]) -> str:
    """How well the parts add up to the blocks they make, stage by stage."""
    ratios = []
    for stage in found["stages"]:
        if "blocks" in stage:
            parts = sum(row["seconds"] for row in stage["parts"] if row["part"] != "downsample")
            ratios.append(f"{stage['stage']} {stage['blocks']['seconds'] / parts:.2f}")
    return f"Blocks run in a row, over the sum of their parts: {', '.join(ratios)}"


def _row(label: str, count: str, row: Mapping[str, Any], set_by: str, total: float) -> tuple[str, ...]:
    return (
        label,
        count,
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['macs'] / 1e9:.3f}",
        f"{1e3 * row['floor']:.3g}",
        set_by,
        f"{1e3 * row['seconds']:.3g}",
        f"{row['seconds'] / row['floor']:.2f}",
        f"{row['seconds'] / total:.1%}",
    )


def _parser() -> Parser:
    parser = Parser("budget", __doc__)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["tiny"])
    parser.add_argument("--dtype", nargs="+", choices=options.DTYPES, default=["float32"], help="of the activations")
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, default=list(MODES), help="fused: inference after model.fuse()"
    )
    parser.add_argument("--batch", type=options.whole_number, help="images: by default 8 on a CPU, 128 on a GPU")
    parser.add_argument("--size", type=options.image_size, default=224, help="side of the images")
    parser.add_argument("--seconds", type=options.seconds, default=3.0, help="of timing per stage")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for options that cannot be."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
    kept = prepare(device, args.threads)
    report = Report(parser, args, device)
    report.record |= {"freed_memory_kept": kept, "results": []}
    batch = args.batch or options.BATCHES[device.type]
    for variant in args.variant:
        for dtype in args.dtype:
            for mode in args.mode:
                model = build(variant).to(device)
                budget = Budget(model, device, getattr(torch, dtype), mode, args.seconds)
                found = budget.run(batch, args.size)
                setting = {"variant": variant, "dtype": dtype, "mode": mode, "batch": batch, "size": args.size}
                roof = {"bandwidth": budget.bandwidth, "peak": budget.peak}
                report.record["results"].append({**setting, **roof, **found})
                title = (
                    f"{variant}, {dtype}, {mode}, batch {batch} at {args.size}x{args.size}; memory copy "
                    f"{budget.bandwidth / 1e9:.1f} GB/s, matrix product {budget.peak / 1e9:.0f} GFLOP/s"
                )
                report.table(table(title, found))
                report.say(blocks_line(found))
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
