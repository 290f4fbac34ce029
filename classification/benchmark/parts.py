"""Where the time goes: the parts of Spatial-Mamba, each compared with a lower bound of its time.

The lower bound is the longer of the time that the compulsory bytes of a part take at the bandwidth of a memory copy and
the time that its multiply-adds take at the speed of a large matrix product; both are measured in the same run.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import Column, Report
from ..models.spatial_mamba import SpatialMamba
from .prepared import FUSED, TRAIN, Case
from .roster import OURS, Model

COLUMNS = (
    Column("part", "name"),
    Column("times", "count", "d"),
    Column("MB", "bytes", ".1f", 1e-6),
    Column("GMAC", "flops", ".3f", 0.5e-9),
    Column("bound ms", "bound", ".3g", 1e3),
    Column("set by", "set_by"),
    Column("ms", "seconds", ".3g", 1e3),
    Column("x bound", "times_bound", ".2f"),
    Column("of the time", "fraction", ".1%"),
)
WHOLE = "the model as a whole"
Shape = Sequence[int]


def add_tables(
    report: Report, takes_part: Sequence[tuple[Model, str]], case: Case, device: torch.device, seconds: float
) -> None:
    """One table per form of Spatial-Mamba, eager or fused; ``seconds`` of timing for each."""
    for model, form in takes_part:
        if model.family == OURS:
            bench = Bench(model.create(case.resolution).to(device), case, device, is_fused=form == FUSED)
            roofs = f"memory copy {bench.bandwidth / 1e9:.1f} GB/s, matrix product {bench.peak / 1e9:.0f} GFLOP/s"
            setting = {"model": model.name, "form": form, "bandwidth": bench.bandwidth, "peak": bench.peak}
            rows = bench.run(seconds)
            report.add(f"{model.name}, {form}  {case}: {roofs}", COLUMNS, rows, **vars(case), **setting)


class Bench:
    """Measures the parts of one classifier.

    Inference has weights and activations of the case's dtype; training has float32 weights, under autocast to it.
    What lies inside a part (the hidden layer of an MLP, the channels between two convolutions of the stem) need not
    go through memory, and is not counted.
    """

    def __init__(self, model: SpatialMamba, case: Case, device: torch.device, is_fused: bool) -> None:
        self.device, self.dtype, self.is_training = device, getattr(torch, case.dtype), case.mode == TRAIN
        self.model = model.train() if self.is_training else model.eval().to(self.dtype)
        if is_fused:
            model.fuse()
        self.images = (case.images, model.in_chans, case.resolution, case.resolution)
        self.clock = measure.operator_clock(device)
        copy_call = measure.memory_copy(device)
        self.bandwidth = 2 * measure.COPY_BYTES / min(self.clock(copy_call) for _ in range(5))
        self.peak = measure.matmul_peak(self.clock, device, self.dtype)
        self.rows: list[measure.Row] = []
        self.calls: dict[str, measure.Call] = {}

    def run(self, seconds: float) -> list[measure.Row]:
        """A row per part, for all its occurrences together; their sum; the model as a whole. Times in seconds."""
        self.add_all()
        self.add(WHOLE, 1, self.model, self.images, reads=(self.model,), is_first=True)
        for call in self.calls.values():
            call()
        timings = measure.interleave(self.calls, self.clock, seconds)
        for row in self.rows:
            row["seconds"] = row["count"] * timings[row["name"]]["seconds"]
        *parts, whole = self.rows
        sums = {key: sum(row[key] for row in parts) for key in ("bytes", "flops", "bound", "seconds")}
        self.rows.insert(-1, {"name": "sum of all parts", **sums})
        whole |= {key: sums[key] for key in ("bytes", "flops", "bound")} | {"set_by": "", "count": None}
        for row in self.rows:
            row |= {"times_bound": row["seconds"] / row["bound"], "fraction": row["seconds"] / sums["seconds"]}
        return self.rows

    def add_all(self) -> None:
        """Add the parts in the order they run in. The blocks of a stage have the same shapes: one stands for all."""
        model = self.model
        tokens = self.add("stem", 1, model.patch_embed, self.images, reads=(model.patch_embed,), is_first=True)
        for i, stage in enumerate(model.layers, 1):
            add = self._add_fused_block if model.fused else self._add_block
            add(f"stage {i}:", len(stage.blocks), stage.blocks[-1], tokens)
            if not isinstance(stage.downsample, nn.Identity):
                down = stage.downsample
                tokens = self.add(f"stage {i}: downsample", 1, down, tokens, reads=(down,))
        self.add("head", 1, lambda x: model.forward_head(model.norm(x)), tokens, reads=(model.norm, model.head))

    def _add_block(self, stage: str, depth: int, block: nn.Module, tokens: Shape) -> None:
        ssm, inner, wide = block.self_attention, *_wider(tokens)
        mixer = copy.deepcopy(ssm)  # what lies between the projections
        mixer.in_proj = mixer.out_proj = nn.Identity()
        modules = {
            "cpe1 + x": (block.cpe1, tokens),
            "ln_1": (block.ln_1, tokens),
            "in_proj": (ssm.in_proj, tokens),
            "mixer": (mixer, wide),
            "out_proj": (ssm.out_proj, inner),
            "cpe2 + x": (block.cpe2, tokens),
            "ln_2": (block.ln_2, tokens),
            "mlp": (block.mlp, tokens),
        }
        for name, (module, shape) in modules.items():
            self.add(f"{stage} {name}", depth, module, shape, reads=(module,))
        # Forward the sum with a branch; backward the sum of the gradients that meet at the fork.
        count = 2 * depth * (2 if self.is_training else 1)
        self.add(f"{stage} residual sums", count, block.residual_sum, tokens, tokens, has_backward=False)

    def _add_fused_block(self, stage: str, depth: int, block: nn.Module, tokens: Shape) -> None:
        inner, wide = _wider(tokens)

        def in_proj(x: Tensor) -> Tensor:
            return block.in_proj(x, block.ln_1)

        def out_proj(y: Tensor, x: Tensor) -> Tensor:
            return block.out_proj(y, residual=x)

        self.add(f"{stage} cpe1 + x", depth, block.cpe1, tokens, reads=(block.cpe1,))
        self.add(f"{stage} ln_1, in_proj", depth, in_proj, tokens, reads=(block.ln_1, block.in_proj))
        self.add(f"{stage} mixer", depth, block.mixer, wide, reads=(block.mixer,))
        self.add(f"{stage} out_proj + x", depth, out_proj, inner, tokens, reads=(block.out_proj,))
        self.add(f"{stage} cpe2 + x", depth, block.cpe2, tokens, reads=(block.cpe2,))
        self.add(f"{stage} ln_2, mlp + x", depth, block.mlp, tokens, reads=(block.mlp,))

    def add(
        self,
        name: str,
        count: int,
        function: Callable[..., Tensor],
        *shapes: Shape,
        reads: Sequence[nn.Module] = (),
        has_backward: bool = True,
        is_first: bool = False,
    ) -> Shape:
        """Add a part: its bytes and FLOPs, the lower bound of its time, and a call of it.

        Each input and weight is read once, the output written once. With a backward pass inputs and weights are read
        again, the gradient of the output is read, and one gradient per input and weight is written.

        Args:
            count: how often the model has it; bytes, FLOPs and times are for all occurrences.
            shapes: of its inputs.
            reads: modules whose weights it reads.
            has_backward: whether a training step asks for gradients.
            is_first: leave out the gradients of the inputs.

        Returns:
            The shape of its output.
        """

        def forward(*tensors: Tensor) -> Tensor:
            half = self.is_training and self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
                return function(*tensors)

        tensors = [torch.randn(shape, device=self.device).to(self.dtype) for shape in shapes]
        # Buffers take the place of parameters in a fused model.
        weights = [x for module in reads for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
        output, flops = measure.dry_run(forward, *tensors)
        size = _bytes(tensors) + _bytes(weights) + _bytes([output])
        if self.is_training and has_backward:
            sources = [x for x in weights if x.requires_grad]
            sources += [] if is_first else [x.requires_grad_() for x in tensors]
            size, flops = 2 * size + _bytes(sources), flops * measure.TRAINING_PASSES
            gradient = torch.randn_like(forward(*tensors))
            self.calls[name] = lambda: torch.autograd.grad(forward(*tensors), sources, gradient)
        else:
            self.calls[name] = torch.no_grad()(lambda: forward(*tensors))
        bounds = {"bytes": size / self.bandwidth, "operations": flops / self.peak}
        set_by = max(bounds, key=lambda key: bounds[key])
        row = {"bytes": count * size, "flops": count * flops, "bound": count * bounds[set_by]}
        self.rows.append({"name": name, "count": count, "set_by": set_by, **row})
        return output.shape


def _wider(tokens: Shape) -> tuple[Shape, Shape]:
    """The shapes of the mixer's channels, and of these with their gate."""
    return (*tokens[:-1], 2 * tokens[-1]), (*tokens[:-1], 4 * tokens[-1])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)
