"""Models prepared for timing: in their mode, dtype, memory format and form, with the pass or step to time."""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.benchmark import measure
from .roster import BASE_RESOLUTION, BASELINE, OURS, Model

INFERENCE, TRAIN = "inference", "train"
MODES = (INFERENCE, TRAIN)
EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH = "eager", "fused", "compile", "fused+compile", "cudagraph"
CHECKPOINT, ONNX, ONNX_INT8, AOTI = "checkpoint", "onnx", "onnx+int8", "aoti"
FORMS = (EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH, CHECKPOINT, ONNX, ONNX_INT8, AOTI)
COMPILED, EXPORTED = (COMPILE, FUSED_COMPILE, CUDAGRAPH), (ONNX, ONNX_INT8, AOTI)
# The form used instead where a model or mode lacks one.
REPLACEMENTS = {FUSED: EAGER, FUSED_COMPILE: COMPILE} | dict.fromkeys(EXPORTED, EAGER)
MOST_COMPILED = 256  # graphs that torch.compile keeps per function; by default it gives up after 8
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
TRIALS = 2  # per setting; the faster one counts
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
LOSS_SCALE = 1024.0  # for float16: low enough that no step is skipped


@dataclass(frozen=True)
class Case:
    """The work to time in every model: a pass over random images, in inference or in a training step."""

    mode: str
    dtype: str
    resolution: int
    images: int

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.resolution}x{self.resolution}, batch {self.images}"


def form_of(model: Model, form: str, mode: str) -> str:
    """The form in which a model runs if the user asks for ``form``; the baseline is always eager."""
    if model.family == BASELINE or (form == CHECKPOINT and mode == INFERENCE):
        return EAGER
    return form if model.family == OURS and mode == INFERENCE else REPLACEMENTS.get(form, form)


class Prepared:
    """A model with random weights in one form, for one case.

    Attributes:
        module: the model.
        forward: a function of the images: the model, or its compiled or exported form.
        setting: the memory format, and the attention of models that have one.
        weight_bytes: of parameters and buffers, or of the exported file.

    Raises:
        NotRunError: if one of timm's models cannot take images of this size.
    """

    def __init__(self, model: Model, form: str, case: Case, device: torch.device) -> None:
        self.form, self.case, self.device, self.dtype = form, case, device, getattr(torch, case.dtype)
        side = case.resolution
        try:
            self.module: Any = model.create(side).to(device)
        except Exception as reason:  # each model raises its own type
            if not model.is_peer or side == BASE_RESOLUTION:
                raise
            raise measure.NotRunError(f"cannot take {side}x{side} images: {reason}") from reason
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.randn(case.images, 3, side, side, generator=generator, device=device)
        self.optimizer: torch.optim.Optimizer | None = None
        if case.mode == INFERENCE:
            self.module.eval().to(self.dtype)
            self.images = self.images.to(self.dtype)
        else:
            weights = self.module.train().parameters()
            self.optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=case.dtype == "float16")
        self.forward: Callable[[Tensor], Tensor] = self.module
        self.setting = self._choose_setting(model.layouts)
        self.weight_bytes = sum(x.nbytes for x in (*self.module.parameters(), *self.module.buffers()))
        self._take_form()

    def step(self) -> Tensor:
        """A forward pass, which returns the logits, or a whole training step, which returns the loss."""
        result = self._one_pass()
        if self.optimizer is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return result

    def _one_pass(self) -> Tensor:
        if self.form == CUDAGRAPH:
            torch.compiler.cudagraph_mark_step_begin()
        if self.case.mode == INFERENCE:
            with torch.no_grad():
                return self.forward(self.images)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.forward(self.images)
        loss = F.cross_entropy(logits.float(), torch.arange(len(logits), device=self.device) * 37 % logits.shape[1])
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _choose_setting(self, layouts: tuple[str, ...]) -> str:
        """Apply the fastest of the memory formats and kinds of attention; returns its name."""
        # Swin can use PyTorch's fused attention, but timm leaves it off.
        attentions = [part for part in self.module.modules() if hasattr(part, "fused_attn")]
        kinds = ("plain attention", "fused attention") if attentions else ("",)
        settings = list(itertools.product(layouts, kinds))

        def apply(layout: str, attention: str) -> None:
            self.module.to(memory_format=LAYOUTS[layout])
            self.images = self.images.contiguous(memory_format=LAYOUTS[layout])
            for part in attentions:
                part.fused_attn = attention == "fused attention"

        chosen = min(settings, key=lambda setting: self._seconds(apply, setting)) if len(settings) > 1 else settings[0]
        apply(*chosen)
        return ", ".join(filter(None, chosen))

    def _seconds(self, apply: Callable[..., None], setting: tuple[str, str]) -> float:
        """Seconds of a pass in that setting."""
        apply(*setting)
        self._one_pass()
        seconds = min(map(measure.wall_clock(self.device), [self._one_pass] * TRIALS))
        self.module.zero_grad()
        return seconds

    def _take_form(self) -> None:
        if self.form in (FUSED, FUSED_COMPILE, CUDAGRAPH) and hasattr(self.module, "fuse") and self.optimizer is None:
            self.module.fuse()
        if self.form == CHECKPOINT:
            self.module.set_grad_checkpointing()
        if self.form in COMPILED:
            torch._dynamo.config.recompile_limit = MOST_COMPILED
            mode = "reduce-overhead" if self.form == CUDAGRAPH else None
            self.forward = torch.compile(self.module, fullgraph=True, dynamic=False, mode=mode)
        if self.form in EXPORTED:
            self._export()

    def _export(self) -> None:
        from ..export import export_aoti, export_onnx
        from ..export.onnx_file import onnx_session

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("model.pt2" if self.form == AOTI else "model.onnx")
            if self.form == AOTI:
                export_aoti(self.module, path, self.case.resolution)
                self.forward = torch._inductor.aoti_load_package(str(path))
            else:
                export_onnx(self.module, path, self.case.resolution, int8=self.form == ONNX_INT8)
                session = onnx_session(path, torch.get_num_threads())
                self.forward = lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            self.weight_bytes = path.stat().st_size


def make_call(model: Model, form: str, case: Case, device: torch.device, row: measure.Row) -> measure.Call:
    """The call to time, and its facts in ``row``, as for ``measure.Trial``."""
    row |= {"model": model.name, "form": form, "family": model.family, "accuracy": model.accuracy}
    prepared = Prepared(model, form, case, device)
    row |= {"weight_bytes": prepared.weight_bytes, "note": prepared.setting}
    if form in (CUDAGRAPH, *EXPORTED):  # graphs share one pool; PyTorch does not record what programs allocate
        row["peak_bytes"] = None
    return prepared.step
