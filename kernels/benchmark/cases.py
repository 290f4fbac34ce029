"""What is timed: operators and shapes, with the bytes and operations that each cannot do without."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..depthwise_conv import CONV_FLOPS
from ..selective_scan import SCAN_FLOPS
from ..state_fusion import tap_offsets
from .measure import TRAINING_PASSES

DILATIONS = (1, 3, 5)
TAPS = len(tap_offsets([3] * len(DILATIONS), DILATIONS)) // 2
WIDTHS = {"tiny": 64, "base": 96}  # of the first stage; small has the shapes of tiny
LARGE_IMAGES = {(800, 1280): 2, (2048, 2048): 1}  # with the batch
MAMBA_STATES, MAMBA_BATCH = 16, 16  # N of Mamba's own scan, and the largest batch that it is timed at


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    The operators are ``core`` (``structure_aware_scan``), ``states`` (``selective_scan`` without C, as Spatial-Mamba
    uses it), ``scan`` (``selective_scan`` with C, D and z, as Mamba uses it), ``fusion`` (``state_fusion``), ``mixer``
    (``spatial_mixer``), ``conv`` and ``position`` (``depthwise_conv`` with SiLU, and with the residual), and ``norm``
    (``gated_norm``).
    """

    name: str
    operator: str
    batch: int
    height: int
    width: int
    dim: int
    rank: int = 1
    d_state: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.height * self.width

    @property
    def length(self) -> int:
        return self.height * self.width

    def activations(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs that are tokens, of the I/O dtype."""
        image = (self.batch, self.height, self.width)
        if self.operator == "core":
            return {"u": (*image, self.dim), "projection": (*image, self.rank + 2)}
        if self.operator == "mixer":
            return {"xz": (*image, 2 * self.dim)}
        if self.operator in ("conv", "position"):
            return {"x": (*image, self.dim)}
        if self.operator == "norm":
            return {"y": (*image, self.dim), "gate": (*image, self.dim)}
        if self.operator == "fusion":
            return {"h": (self.batch, self.dim, self.height, self.width)}
        channels, shared = (self.batch, self.dim, self.length), (self.batch, self.d_state, self.length)
        if self.operator == "states":
            return {"u": channels, "delta": channels, "B": shared}
        return {"u": channels, "delta": channels, "B": shared, "C": shared, "z": channels}

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs that are weights, always float32."""
        per_channel = (self.dim,)
        kernels = {f"kernel_{dilation}": (self.dim, 1, 3, 3) for dilation in DILATIONS} | {"alpha": (len(DILATIONS),)}
        norm = {"norm_weight": per_channel, "norm_bias": per_channel}
        conv = {"conv_weight": (self.dim, 1, 3, 3), "conv_bias": per_channel}
        if self.operator in ("core", "mixer"):
            step = {"step_weight": (self.dim, self.rank), "step_bias": per_channel}
            core = step | {"A_log": per_channel, "D": per_channel} | kernels
            projection = {"projection_weight": (self.rank + 2, self.dim)}
            return core if self.operator == "core" else conv | projection | core | norm
        if self.operator in ("conv", "position"):
            return conv
        if self.operator == "norm":
            return norm
        if self.operator == "fusion":
            return kernels
        skip = {"D": per_channel} if self.operator == "scan" else {}
        return {"A": (self.dim, self.d_state), "delta_bias": per_channel} | skip

    def output(self) -> tuple[int, ...]:
        if self.operator == "states":
            return (self.batch, self.dim, self.d_state, self.length)
        if self.operator == "mixer":
            return (self.batch, self.height, self.width, self.dim)
        return next(iter(self.activations().values()))

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """States are an intermediate and stay in the dtype of the recurrence."""
        return torch.promote_types(dtype, torch.float32) if self.operator == "states" else dtype

    def compulsory_bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """The fewest bytes that can move: each input read once, each output written once.

        With ``backward``, of a forward and a backward pass: the inputs are read again, which are all that a backward
        pass has to know, the gradient of the output is read, and one gradient per input is written. Whatever else an
        implementation saves, recomputes or reads twice is its own affair and does not count.
        """
        inputs = dtype.itemsize * sum(map(math.prod, self.activations().values()))
        inputs += torch.float32.itemsize * sum(map(math.prod, self.weights().values()))
        output = self.output_dtype(dtype).itemsize * math.prod(self.output())
        forward = inputs + output
        return forward + (inputs + output + inputs) if backward else forward

    def operations(self, backward: bool) -> int:
        """Floating-point operations, a multiply-add counted as two; see the FLOP formulas in ``operators/``.

        A backward pass counts as in ``TRAINING_PASSES``.
        """
        core = 2 * self.rank + SCAN_FLOPS + 2 * TAPS
        per_channel = {
            "core": core,
            "mixer": CONV_FLOPS + 2 * (self.rank + 2) + core,
            "conv": CONV_FLOPS,
            "position": CONV_FLOPS,
            "norm": 0,  # norms and activations are not counted
            "fusion": 2 * TAPS,
            "states": SCAN_FLOPS * self.d_state,
            "scan": SCAN_FLOPS * self.d_state,
        }
        forward = self.tokens * self.dim * per_channel[self.operator]
        return TRAINING_PASSES * forward if backward else forward

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random inputs, the same at every call, spread like those of a model at the start of its training."""
        generator = torch.Generator(device).manual_seed(0)
        activations = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in self.activations().items()
        }
        weights = {
            name: _initial(name, torch.rand(shape, generator=generator, device=device))
            for name, shape in self.weights().items()
        }
        return activations | weights

    def grad_output(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(self.output(), generator=generator, device=device).to(self.output_dtype(dtype))

    def cropped(self, elements: int) -> "Case":
        """The case with fewer images and, if one is still too much, fewer channels; the image keeps its size."""
        per_image = self.length * self.dim * self.d_state
        if per_image <= elements:
            return replace(self, batch=min(self.batch, elements // per_image))
        blocks_of_32 = max(1, elements // (32 * self.length * self.d_state))
        return replace(self, batch=1, dim=min(self.dim, 32 * blocks_of_32))


def all_cases(batch: int) -> list[Case]:
    """The shapes of the published models, those of tiny first.

    Args:
        batch: images of 224x224; the large ones come in ones and twos.
    """
    cases = []
    for model in WIDTHS:
        cases += [_stage("core", model, stage, (224, 224), batch) for stage in (1, 2, 3, 4)]
        cases += [_stage("core", model, 1, image, few) for image, few in LARGE_IMAGES.items()]
        if model == "tiny":
            cases += [_stage(operator, model, 1, (224, 224), batch) for operator in ("states", "fusion")]
            cases += [_stage("mixer", model, stage, (224, 224), batch) for stage in (1, 2, 3, 4)]
            small = ("conv", "position", "norm")
            cases += [_stage(operator, model, stage, (224, 224), batch) for operator in small for stage in (1, 3)]
            cases.append(_stage("scan", model, 1, (224, 224), min(batch, MAMBA_BATCH), MAMBA_STATES))
    return cases


def _stage(operator: str, model: str, stage: int, image: Sequence[int], batch: int, d_state: int = 1) -> Case:
    channels = WIDTHS[model] * 2 ** (stage - 1)
    stride = 4 * 2 ** (stage - 1)
    height, width = image
    return Case(
        name=f"{operator}/{model}/stage{stage}/{height}x{width}",
        operator=operator,
        batch=batch,
        height=height // stride,
        width=width // stride,
        dim=channels if operator == "position" else 2 * channels,
        rank=math.ceil(channels / 16),
        d_state=d_state,
    )


def _initial(name: str, uniform: Tensor) -> Tensor:
    """A weight by its name, made of values uniform in [0, 1)."""
    if name in ("step_weight", "projection_weight"):
        return (2 * uniform - 1) * uniform.shape[1] ** -0.5
    if name in ("conv_weight", "conv_bias"):
        return (2 * uniform - 1) / 3
    if name in ("step_bias", "delta_bias"):  # the inverse softplus of steps log-uniform in [1e-3, 1e-1]
        return torch.log(torch.expm1(torch.exp(uniform * math.log(100) + math.log(1e-3))))
    if name == "A":
        return -(0.5 + uniform) * torch.arange(1, uniform.shape[1] + 1, device=uniform.device)
    if name == "A_log":
        return torch.log(0.5 + uniform)
    return 0.5 + uniform  # D, the fusion kernels and their weights: around 1
