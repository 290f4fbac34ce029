"""Models made ready to be timed: in their mode, dtype, memory format and form, with the pass or step that they do."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.benchmark import measure
from .flops import forward_flops
from .published import as_published
from .roster import BASE_RESOLUTION, Model

INFERENCE, TRAIN = "inference", "train"
MODES = (INFERENCE, TRAIN)
EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH = "eager", "fused", "compile", "fused+compile", "cudagraph"
FORMS = (EAGER, FUSED, COMPILE, FUSED_COMPILE, CUDAGRAPH)
COMPILED = (COMPILE, FUSED_COMPILE, CUDAGRAPH)
UNFUSED = {FUSED: EAGER, FUSED_COMPILE: COMPILE}
# Of the trial between memory formats: images at most, and rounds, of which the best counts.
LAYOUT_IMAGES, TRIAL_ROUNDS = {"cpu": 2, "cuda": 64}, 2
LAYOUT_MARGIN = 1.03  # what contiguous memory has to be faster by, lest noise decides
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
LOSS_SCALE = 1024.0  # for float16: low enough that no step is skipped
CLASSES = 1000

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """What all competitors do: a pass over ``images`` random images, in inference or in a training step.

    Attributes:
        batch: images as asked for; fewer may be taken of large images, see ``Choices.same_pixels``.
    """

    mode: str
    dtype: str
    resolution: int
    batch: int
    images: int


@dataclass
class Competitor:
    """A model in one form, for one mode, dtype and resolution; or the reason why there is none.

    Attributes:
        forward: the model as it is called.
        weights: bytes of its parameters and buffers.
        flops: of the forward pass of one image; of the published formulation those of ours, whose work it does.
    """

    model: Model
    form: str
    device: torch.device
    refusal: str | None = None
    module: nn.Module | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    channels_last: bool = False
    optimizer: torch.optim.Optimizer | None = None
    flops: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.form}"

    @property
    def weights(self) -> int:
        return sum(x.numel() * x.itemsize for x in (*self.module.parameters(), *self.module.buffers()))

    @property
    def optimizer_state(self) -> int:
        if self.optimizer is None:
            return 0
        tensors = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        return sum(x.numel() * x.itemsize for x in tensors)

    def one_pass(self, case: Case, scaler: torch.amp.GradScaler) -> Call:
        """The forward pass, which gives the logits; in training, loss and backward pass too, which give the loss."""
        dtype, device = getattr(torch, case.dtype), self.device
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(case.images, 3, case.resolution, case.resolution, generator=generator, device=device)
        images = images.to(memory_format=_layout(self.channels_last))
        forward, graphed = self.forward, self.form == CUDAGRAPH
        if case.mode == INFERENCE:
            images = images.to(dtype)

            def infer() -> Tensor:
                if graphed:
                    torch.compiler.cudagraph_mark_step_begin()
                with torch.no_grad():
                    return forward(images)

            return infer

        labels = torch.arange(case.images, device=device) * 37 % CLASSES

        def learn() -> Tensor:
            if graphed:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            return loss.detach()

        return learn

    def step(self, case: Case) -> Call:
        """What is timed: the pass, and in training the update of the weights."""
        scaler, optimizer = scaler_for(case, self.device), self.optimizer
        run = self.one_pass(case, scaler)
        if optimizer is None:
            return run

        def step() -> Tensor:
            loss = run()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

        return step


def build(model: Model, form: str, trial: Case, device: torch.device, clock: measure.Clock) -> Competitor:
    """A model in its mode, dtype, memory format and form; or, if a peer objects to the size, the reason.

    Whatever else goes wrong comes up as a failure at the first call, and is no reason to stop the others.

    Args:
        trial: what memory formats are compared on, with ``clock``; mode, dtype and resolution are for good.
    """
    competitor = Competitor(model, form, device)
    try:
        module = model.create(trial.resolution)
    except Exception as reason:  # each model has its own way to object to an image
        if model.is_peer and trial.resolution != BASE_RESOLUTION:
            size = f"{trial.resolution}x{trial.resolution}"
            competitor.refusal = f"cannot run {size} images: {measure.failure_text(reason)}"
        else:
            competitor.forward = _raiser(reason)
        return competitor
    try:
        competitor.flops = forward_flops(module, trial.resolution)
        if model.as_written:
            as_published(module)
        _furnish(competitor, module, trial, clock)
    except Exception as reason:
        competitor.forward = _raiser(reason)
    return competitor


def form_of(model: Model, form: str, mode: str) -> str:
    """The form that a model has in that mode where the user asks for ``form``."""
    if model.as_written:
        return EAGER
    return form if model.fuses and mode == INFERENCE else UNFUSED.get(form, form)


def _furnish(competitor: Competitor, module: nn.Module, trial: Case, clock: measure.Clock) -> None:
    """Bring the model into its mode, dtype, layout and form."""
    competitor.module = module
    module.to(competitor.device)
    if trial.mode == INFERENCE:
        module.eval().to(getattr(torch, trial.dtype))
    else:
        module.train()
        competitor.optimizer = torch.optim.AdamW(
            module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
    competitor.forward = module
    competitor.channels_last = _faster_layout(competitor, trial, clock)
    module.to(memory_format=_layout(competitor.channels_last))
    competitor.notes.append("channels-last" if competitor.channels_last else "contiguous")
    if attentions := [part for part in module.modules() if hasattr(part, "fused_attn")]:
        competitor.notes.append(_faster_attention(attentions, competitor, trial, clock))
    if trial.mode == INFERENCE and competitor.model.fuses and competitor.form in (FUSED, FUSED_COMPILE, CUDAGRAPH):
        module.fuse()
    if competitor.form in COMPILED:
        competitor.forward = torch.compile(
            module, fullgraph=True, dynamic=False, mode="reduce-overhead" if competitor.form == CUDAGRAPH else None
        )


def _faster_layout(competitor: Competitor, case: Case, clock: measure.Clock) -> bool:
    """Whether to run channels-last, found in a short trial: unless contiguous memory is clearly faster."""
    if len(competitor.model.layouts) == 1:
        return competitor.model.layouts[0]
    best: dict[bool, float] = {}
    for channels_last in competitor.model.layouts:
        competitor.channels_last = channels_last
        competitor.module.to(memory_format=_layout(channels_last))
        best[channels_last] = _shortest(competitor, case, clock)
    return best[True] < LAYOUT_MARGIN * best[False]


def _faster_attention(attentions: list[nn.Module], competitor: Competitor, case: Case, clock: measure.Clock) -> str:
    """Give timm's attention layers PyTorch's fused attention if that is faster in a short trial; what it has come to.

    For Swin timm leaves it off, whatever the device.
    """
    best: dict[bool, float] = {}
    for fused in (False, True):
        for attention in attentions:
            attention.fused_attn = fused
        best[fused] = _shortest(competitor, case, clock)
    for attention in attentions:
        attention.fused_attn = best[True] < best[False]
    return "fused attention" if best[True] < best[False] else "attention written out"


def _shortest(competitor: Competitor, case: Case, clock: measure.Clock) -> float:
    """Seconds of the shortest of a few passes, without the weights' update."""
    call = competitor.one_pass(case, scaler_for(case, competitor.device))
    call()
    seconds = min(clock(call, 0.0)[0] for _ in range(TRIAL_ROUNDS))
    competitor.module.zero_grad()
    return seconds


def scaler_for(case: Case, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for float16, and does nothing for the others."""
    return torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=case.dtype == "float16")


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _raiser(reason: Exception) -> Callable[[Tensor], Tensor]:
    def fail(_: Tensor) -> Tensor:
        raise reason

    return fail
