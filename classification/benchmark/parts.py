"""Where the time goes: the parts of Spatial-Mamba, each compared with a lower bound on its time.

The lower bound is the longer of two times: for the compulsory bytes at the bandwidth of a memory copy, and for the
multiply-adds at the speed of a large matrix product. Both speeds are measured in the same run.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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


def add_tables(report: Report, pairs: Sequence[tuple[Model, str]], case: Case, trial: measure.Trial) -> None:
    """Add one table per form of Spatial-Mamba, eager or fused, to the report."""
    for model, form in pairs:
        if model.family == OURS:
            module: Any = model.create(case.resolution).to(trial.device)
            bench = Bench(module, case, trial, is_fused=form == FUSED)
            roofs = f"memory copy {bench.bandwidth / 1e9:.1f} GB/s, matrix product {bench.peak / 1e9:.0f} GFLOP/s"
            setting = {"model": model.name, "form": form, "bandwidth": bench.bandwidth, "peak": bench.peak}
            report.add(f"{model.name}, {form}, {case}: {roofs}", COLUMNS, bench.run(), **vars(case), **setting)


class Bench:
    """Measures the parts of one classifier.

    In inference weights and activations have the case's dtype; in training weights are float32, and the parts run under
    autocast to it. Tensors inside a part, such as the hidden layer of an MLP, need not go through memory and do not
    count.
    """

    def __init__(self, model: SpatialMamba, case: Case, trial: measure.Trial, is_fused: bool) -> None:
        self.trial, self.dtype, self.is_training = trial, getattr(torch, case.dtype), case.mode == TRAIN
        self.model = model.train() if self.is_training else model.eval().to(self.dtype)
        if is_fused:
            model.fuse()
        self.images = (case.images, model.in_chans, case.resolution, case.resolution)
        self.bandwidth = measure.copy_bandwidth(trial.clock, trial.device)
        self.peak = measure.matmul_peak(trial.clock, trial.device, self.dtype)
        self.rows: list[measure.Row] = []
        self.calls: dict[str, measure.Call] = {}

    def run(self) -> list[measure.Row]:
        """A row per part, for all its occurrences together; their sum; and the whole model. Times in seconds."""
        self.add_all()
        self.add(WHOLE, 1, self.model, self.images, is_first=True)
        for call in self.calls.values():
            call()
        timings = self.trial.interleave(self.calls)
        for row in self.rows:
            row["seconds"] = row["count"] * timings[row["name"]]["seconds"]
        *parts, whole = self.rows
        sums = {key: sum(row[key] for row in parts) for key in ("bytes", "flops", "bound", "seconds")}
        self.rows.insert(-1, {"name": "sum of all parts", **sums})
        whole |= {key: sums[key] for key in ("bytes", "flops", "bound")} | {"set_by": None, "count": None}
        for row in self.rows:
            row |= {"times_bound": row["seconds"] / row["bound"], "fraction": row["seconds"] / sums["seconds"]}
        return self.rows

    def add_all(self) -> None:
        """Add the parts in the order they run; one block represents all blocks of a stage, which have equal shapes."""
        model: Any = self.model
        tokens = self.add("stem", 1, model.patch_embed, self.images, is_first=True)
        for i, stage in enumerate(model.layers, 1):
            add = self._add_fused_block if model.fused else self._add_block
            add(f"stage {i}:", len(stage.blocks), stage.blocks[-1], tokens)
            if not isinstance(stage.downsample, nn.Identity):
                tokens = self.add(f"stage {i}: downsample", 1, stage.downsample, tokens)
        self.add("head", 1, lambda x: model.forward_head(model.norm(x)), tokens, reads=(model.norm, model.head))

    def _add_block(self, stage: str, depth: int, block: Any, tokens: Shape) -> None:
        ssm = block.self_attention
        mixer = copy.deepcopy(ssm)  # everything between the projections
        mixer.in_proj = mixer.out_proj = nn.Identity()
        self.add(f"{stage} cpe1 + x", depth, block.cpe1, tokens)
        self.add(f"{stage} ln_1", depth, block.ln_1, tokens)
        wide = self.add(f"{stage} in_proj", depth, ssm.in_proj, tokens)
        inner = self.add(f"{stage} mixer", depth, mixer, wide)
        self.add(f"{stage} out_proj", depth, ssm.out_proj, inner)
        self.add(f"{stage} cpe2 + x", depth, block.cpe2, tokens)
        self.add(f"{stage} ln_2", depth, block.ln_2, tokens)
        self.add(f"{stage} mlp", depth, block.mlp, tokens)
        # In the forward pass the sum with a branch; in the backward pass the sum of the two gradients at the fork.
        count = 2 * depth * (2 if self.is_training else 1)
        self.add(f"{stage} residual sums", count, block.residual_sum, tokens, tokens, has_backward=False)

    def _add_fused_block(self, stage: str, depth: int, block: Any, tokens: Shape) -> None:
        in_proj = partial(block.in_proj, norm=block.ln_1)

        def out_proj(y: Tensor, x: Tensor) -> Tensor:
            return block.out_proj(y, residual=x)

        self.add(f"{stage} cpe1 + x", depth, block.cpe1, tokens)
        wide = self.add(f"{stage} ln_1, in_proj", depth, in_proj, tokens, reads=(block.ln_1, block.in_proj))
        inner = self.add(f"{stage} mixer", depth, block.mixer, wide)
        self.add(f"{stage} out_proj + x", depth, out_proj, inner, tokens, reads=(block.out_proj,))
        self.add(f"{stage} cpe2 + x", depth, block.cpe2, tokens)
        self.add(f"{stage} ln_2, mlp + x", depth, block.mlp, tokens)

    def add(
        self,
        name: str,
        count: int,
        function: Callable[..., Tensor],
        *shapes: Shape,
        reads: Sequence[nn.Module] | None = None,
        has_backward: bool = True,
        is_first: bool = False,
    ) -> Shape:
        """Add a part: its compulsory bytes and FLOPs, the lower bound on its time, and its measured time.

        Args:
            count: how often it occurs in the model; bytes, FLOPs and times are for all occurrences.
            shapes: the shapes of its inputs.
            reads: the modules whose weights it reads; by default ``function``, which is then a module.
            has_backward: whether a training step computes gradients.
            is_first: leave out the gradients of the inputs.

        Returns:
            The shape of its output.
        """
        device_type, half = self.trial.device.type, self.is_training and self.dtype != torch.float32

        def forward(*tensors: Tensor) -> Tensor:
            with torch.autocast(device_type, self.dtype) if half else contextlib.nullcontext():
                return function(*tensors)

        inputs = [torch.randn(shape, device=self.trial.device).to(self.dtype) for shape in shapes]
        # The weights of a fused model are buffers.
        modules: Any = (function,) if reads is None else reads
        weights = [x for module in modules for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
        output, flops = measure.dry_run(forward, *inputs)
        sources = None
        if self.is_training and has_backward:
            sources = [x for x in weights if x.requires_grad]
            sources += [] if is_first else [x.requires_grad_() for x in inputs]
            flops *= measure.TRAINING_PASSES
            gradient = torch.randn_like(forward(*inputs))
            self.calls[name] = lambda: torch.autograd.grad(forward(*inputs), sources, gradient)
        else:
            self.calls[name] = torch.no_grad()(lambda: forward(*inputs))
        size = measure.compulsory_bytes([*inputs, *weights], output, sources)
        bounds = {"bytes": size / self.bandwidth, "operations": flops / self.peak}
        set_by = max(bounds, key=lambda key: bounds[key])
        row = {"bytes": count * size, "flops": count * flops, "bound": count * bounds[set_by]}
        self.rows.append({"name": name, "count": count, "set_by": set_by, **row})
        return output.shape
