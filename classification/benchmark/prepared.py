"""Models made ready to be timed: in their mode, dtype, memory format and form, with the pass or step that they do."""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.benchmark import measure
from .roster import BASE_RESOLUTION, BASELINE, OURS, Model

INFERENCE, TRAIN = "inference", "train"
MODES = (INFERENCE, TRAIN)
EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH = "eager", "fused", "compile", "fused+compile", "cudagraph"
CHECKPOINT, ONNX, ONNX_INT8, AOTI = "checkpoint", "onnx", "onnx+int8", "aoti"
FORMS = (EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH, CHECKPOINT, ONNX, ONNX_INT8, AOTI)
COMPILED, EXPORTED = (COMPILE, FUSED_COMPILE, CUDAGRAPH), (ONNX, ONNX_INT8, AOTI)
# What takes the place of a form in models and modes that lack it.
ELSEWHERE = {FUSED: EAGER, FUSED_COMPILE: COMPILE} | dict.fromkeys(EXPORTED, EAGER)
MOST_COMPILED = 256  # models that torch.compile keeps at once; it gives up after 8 otherwise
# Of the trial between memory formats: images at most, and rounds, of which the best counts.
TRIAL_IMAGES, TRIAL_ROUNDS = {"cpu": 2, "cuda": 64}, 2
TRIAL_MARGIN = 1.03  # what another setting has to be faster by, lest noise decides
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
LOSS_SCALE = 1024.0  # for float16: low enough that no step is skipped
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """What all models do: a pass over random images, in inference or in a training step."""

    mode: str
    dtype: str
    resolution: int
    images: int

    def __str__(self) -> str:
        return f"{self.mode}  {self.dtype}  {self.resolution}x{self.resolution}  batch {self.images}"


def form_of(model: Model, form: str, mode: str) -> str:
    """The form that a model has in that mode where the user asks for ``form``; the baseline is run as it is written."""
    if model.family == BASELINE or (form == CHECKPOINT and mode == INFERENCE):
        return EAGER
    return form if model.family == OURS and mode == INFERENCE else ELSEWHERE.get(form, form)


class Prepared:
    """A model with random weights in one form, for one case.

    Attributes:
        module: the model.
        forward: the model as it is called.
        flops: of the forward pass of one image; of the baseline those of ours, whose work it does.
        weight_bytes: of parameters and buffers, or of the exported file.
        notes: what has been chosen for it.

    Raises:
        NotRunError: if a peer objects to the size of the images.
    """

    def __init__(self, model: Model, form: str, case: Case, device: torch.device, clock: measure.Clock) -> None:
        self.form, self.case, self.device, self.clock = form, case, device, clock
        try:
            module = model.create(case.resolution)
        except Exception as reason:  # each model has its own way to object to an image
            if not model.is_peer or case.resolution == BASE_RESOLUTION:
                raise
            size = f"{case.resolution}x{case.resolution}"
            raise measure.NotRunError(f"cannot take {size} images: {reason}") from reason
        image = torch.empty(1, 3, case.resolution, case.resolution)
        self.flops = measure.dry_run(module.eval(), image)[1]
        self.module = model.finish(module).to(device)
        self.optimizer = None
        if case.mode == INFERENCE:
            module.to(getattr(torch, case.dtype))
        else:
            self.optimizer = torch.optim.AdamW(
                module.train().parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
            )
        self.scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=case.dtype == "float16")
        self.forward: Callable[[Tensor], Tensor] = module
        self.notes = self._choose_settings(model.layouts)
        self.weight_bytes = sum(x.numel() * x.itemsize for x in (*module.parameters(), *module.buffers()))
        self._take_form()

    def step(self) -> Tensor:
        """The forward pass, which gives the logits; in training a whole step, which gives the loss."""
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
        dtype = getattr(torch, self.case.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.forward(self.images)
        loss = F.cross_entropy(logits.float(), torch.arange(len(logits), device=self.device) * 37 % CLASSES)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _apply(self, channels_last: bool, fused_attention: bool | None, images: int) -> str:
        """Bring model and images into a setting; its name."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module.to(memory_format=layout)
        generator = torch.Generator(self.device).manual_seed(0)
        size = (images, 3, self.case.resolution, self.case.resolution)
        images = torch.randn(size, generator=generator, device=self.device).to(memory_format=layout)
        self.images = images.to(getattr(torch, self.case.dtype)) if self.case.mode == INFERENCE else images
        for attention in self._attentions():
            attention.fused_attn = fused_attention
        name = "channels-last" if channels_last else "contiguous"
        return name if fused_attention is None else f"{name}, {'fused' if fused_attention else 'plain'} attention"

    def _attentions(self) -> list[nn.Module]:
        """The layers of timm's models that can take PyTorch's fused attention, which timm leaves off for Swin."""
        return [part for part in self.module.modules() if hasattr(part, "fused_attn")]

    def _choose_settings(self, layouts: tuple[bool, ...]) -> str:
        """Take the first setting, unless another is clearly faster in a short trial; its name."""
        settings = list(itertools.product(layouts, (False, True) if self._attentions() else (None,)))
        chosen = settings[0]
        if len(settings) > 1:
            few = min(self.case.images, TRIAL_IMAGES[self.device.type])
            few = max(1, few * BASE_RESOLUTION**2 // max(self.case.resolution, BASE_RESOLUTION) ** 2)
            seconds = {setting: self._shortest(setting, few) for setting in settings}
            best = min(seconds, key=lambda setting: seconds[setting])
            chosen = best if TRIAL_MARGIN * seconds[best] < seconds[chosen] else chosen
        return self._apply(*chosen, self.case.images)

    def _shortest(self, setting: tuple[bool, bool | None], images: int) -> float:
        """Seconds of the shortest of a few passes, without the weights' update."""
        self._apply(*setting, images)
        self._one_pass()
        seconds = min(self.clock(self._one_pass) for _ in range(TRIAL_ROUNDS))
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


def entry(model: Model, form: str, case: Case, device: torch.device, clock: measure.Clock) -> measure.Entry:
    """The model's part in a trial."""
    facts = {"model": model.name, "form": form, "family": model.family, "accuracy": model.accuracy}

    def make() -> measure.Call:
        prepared = Prepared(model, form, case, device, clock)
        facts.update(weight_bytes=prepared.weight_bytes, flops_per_image=prepared.flops, note=prepared.notes)
        return prepared.step

    # CUDA graphs share one pool, and exported programs allocate what PyTorch does not record.
    return measure.Entry(f"{model.name}, {form}", make, facts, has_memory=form not in (CUDAGRAPH, *EXPORTED))
