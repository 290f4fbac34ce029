"""What is timed: operators on the shapes of the published models, with random inputs by the names of arguments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DILATIONS = (1, 3, 5)
WIDTHS = {"tiny": 64, "base": 96}  # of the first stage; small has the shapes of tiny
LARGE_IMAGES = {(800, 1280): 2, (2048, 2048): 1}  # with the batch
MAMBA_STATES, MAMBA_BATCH = 16, 16  # N of Mamba's own scan, and the largest batch that it is timed at
Shapes = dict[str, tuple[int, ...]]


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

    def activations(self) -> Shapes:
        """Shapes of the inputs that are tokens, of the I/O dtype."""
        image = (self.batch, self.height, self.width)
        tokens, length = (*image, self.dim), self.height * self.width
        channels, shared = (self.batch, self.dim, length), (self.batch, self.d_state, length)
        states = {"u": channels, "delta": channels, "B": shared}
        return {
            "core": {"u": tokens, "projection": (*image, self.rank + 2)},
            "mixer": {"xz": (*image, 2 * self.dim)},
            "conv": {"x": tokens},
            "position": {"x": tokens},
            "norm": {"y": tokens, "gate": tokens},
            "fusion": {"h": (self.batch, self.dim, self.height, self.width)},
            "states": states,
            "scan": {**states, "C": shared, "z": channels},
        }[self.operator]

    def weights(self) -> Shapes:
        """Shapes of the inputs that are weights, always float32."""
        dim, kernel = (self.dim,), (self.dim, 1, 3, 3)
        fusion = {"kernels": (len(DILATIONS), *kernel), "alpha": (len(DILATIONS),)}
        core = {"step_weight": (self.dim, self.rank), "step_bias": dim, "A_log": dim, "D": dim, **fusion}
        around = {"conv_weight": kernel, "conv_bias": dim, "norm_weight": dim, "norm_bias": dim}
        states = {"A": (self.dim, self.d_state), "delta_bias": dim}
        return {
            "core": core,
            "mixer": {"projection_weight": (self.rank + 2, self.dim), **core, **around},
            "conv": {"weight": kernel, "bias": dim},
            "position": {"weight": kernel, "bias": dim},
            "norm": {"weight": dim, "bias": dim},
            "fusion": fusion,
            "states": states,
            "scan": {**states, "D": dim},
        }[self.operator]

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

    def cropped(self, elements: int) -> "Case":
        """The case with fewer images and, if one is still too much, fewer channels; the image keeps its size."""
        per_channel = self.height * self.width * self.d_state
        if per_channel * self.dim <= elements:
            return replace(self, batch=min(self.batch, elements // (per_channel * self.dim)))
        return replace(self, batch=1, dim=min(self.dim, 32 * max(1, elements // (32 * per_channel))))


def gradient_like(output: Tensor, device: torch.device) -> Tensor:
    """A random gradient of the output, the same at every call."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=device).to(output.dtype)


def compulsory_bytes(inputs: Sequence[Tensor], output: Tensor, backward: bool) -> int:
    """The fewest bytes that can move: each input read once, each output written once.

    With ``backward``, of a forward and a backward pass: the inputs are read again, which are all that a backward
    pass has to know, the gradient of the output is read, and one gradient per input is written. Whatever else an
    implementation saves, recomputes or reads twice is its own affair and does not count.
    """
    read, written = (sum(x.numel() * x.itemsize for x in tensors) for tensors in (inputs, [output]))
    return 3 * read + 2 * written if backward else read + written


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
    channels, stride = WIDTHS[model] * 2 ** (stage - 1), 4 * 2 ** (stage - 1)
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
    if name in ("conv_weight", "conv_bias", "weight", "bias"):
        return (2 * uniform - 1) / 3
    if name in ("step_bias", "delta_bias"):  # the inverse softplus of deltas log-uniform in [1e-3, 1e-1]
        return torch.log(torch.expm1(torch.exp(uniform * math.log(100) + math.log(1e-3))))
    if name == "A":
        return -(0.5 + uniform) * torch.arange(1, uniform.shape[1] + 1, device=uniform.device)
    if name == "A_log":
        return torch.log(0.5 + uniform)
    return 0.5 + uniform  # D, the fusion kernels and their weights: around 1
