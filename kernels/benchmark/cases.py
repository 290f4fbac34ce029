"""The cases to time: operators on the shapes of the published models, with random inputs named like their arguments."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DILATIONS = (1, 3, 5)
WIDTHS = {"tiny": 64, "base": 96}  # of the first stage; small has the shapes of tiny
MAMBA_STATES, MAMBA_BATCH = 16, 16  # N of Mamba's own scan, and the largest batch size that it is timed with
SMALL = ("conv", "position", "downsampling", "mlp", "norm")
LARGEST_CHECK = 2**23  # largest number of states to compare with float64, which takes seconds
# Inputs with a batch dimension, which have the dtype of the activations; weights are float32.
ACTIVATIONS = {"u", "projection", "xz", "x", "y", "gate", "h", "delta", "B", "C", "z"}


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    The operators are ``core`` (``structure_aware_scan``), ``states`` (``selective_scan`` without C, as Spatial-Mamba
    uses it), ``scan`` (``selective_scan`` with C, D and z, as Mamba uses it), ``fusion`` (``state_fusion``), ``mixer``
    (``spatial_mixer``), ``conv`` and ``position`` (``depthwise_conv`` with SiLU, and with the residual),
    ``downsampling``, ``mlp``, ``norm`` (``gated_norm``), and ``layer`` (``layer_norm``).
    """

    name: str
    operator: str
    batch: int
    height: int
    width: int
    dim: int
    rank: int = 1
    d_state: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs."""
        image, dim, hidden, rank = (self.batch, self.height, self.width), (self.dim,), 4 * self.dim, self.rank
        tokens, kernel, length = image + dim, (self.dim, 1, 3, 3), self.height * self.width
        channels, shared = (self.batch, self.dim, length), (self.batch, self.d_state, length)
        fusion = {"kernels": (len(DILATIONS), *kernel), "alpha": (len(DILATIONS),)}
        core = {"step_weight": (self.dim, rank), "step_bias": dim, "A_log": dim, "D": dim, **fusion}
        norm = {"norm_weight": dim, "norm_bias": dim}
        mixer = {"projection_weight": (rank + 2, self.dim), "conv_weight": kernel, "conv_bias": dim, **core, **norm}
        conv = {"x": tokens, "weight": kernel, "bias": dim}
        downsampling = {
            "x": tokens,
            "expand": (8 * self.dim, *dim),
            "expand_bias": (8 * self.dim,),
            "conv_weight": (8 * self.dim, 1, 3, 3),
            "conv_bias": (8 * self.dim,),
            "project": (2 * self.dim, 8 * self.dim),
            "project_bias": (2 * self.dim,),
        }
        mlp = {"expand": (hidden, *dim), "expand_bias": (hidden,), "project": (*dim, hidden), "project_bias": dim}
        states = {"u": channels, "delta": channels, "B": shared, "A": (self.dim, self.d_state), "delta_bias": dim}
        return {
            "core": {"u": tokens, "projection": (*image, rank + 2), **core},
            "mixer": {"xz": (*image, 2 * self.dim), **mixer},
            "conv": conv,
            "position": conv,
            "downsampling": downsampling,
            "mlp": {"x": tokens, **mlp},
            "norm": {"y": tokens, "gate": tokens, "weight": dim, "bias": dim},
            "layer": {"x": tokens, "weight": dim, "bias": dim},
            "fusion": {"h": (self.batch, self.dim, self.height, self.width), **fusion},
            "states": states,
            "scan": {**states, "C": shared, "z": channels, "D": dim},
        }[self.operator]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random inputs, the same at every call, distributed as in a model at the start of training.

        Only the biases before a ReLU are larger: rounding must not move a value across 0, where the gradient jumps.
        """
        generator = torch.Generator(device).manual_seed(0)
        inputs = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            if name in ACTIVATIONS
            else _initial(name, torch.rand(shape, generator=generator, device=device))
            for name, shape in self.shapes().items()
        }
        if self.operator == "downsampling":
            inputs |= {name: size * inputs[name].sign() for name, size in (("expand_bias", 4.0), ("conv_bias", 24.0))}
        return inputs

    def cropped(self) -> "Case":
        """The case with fewer images and, if one is still too large, fewer channels of full-size images."""
        channel = self.height * self.width * self.d_state
        dim = min(self.dim, max(32, LARGEST_CHECK // channel // 32 * 32))
        return replace(self, dim=dim, batch=min(self.batch, max(1, LARGEST_CHECK // (channel * dim))))


def gradient_like(output: Tensor) -> Tensor:
    """A random gradient of the output, the same at every call."""
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def all_cases(batch: int) -> list[Case]:
    """The shapes of the published models; ``batch`` is for 224x224 images, larger ones have a batch size of 1 or 2."""
    stages, square = (1, 2, 3, 4), (224, 224)
    cases = []
    for model in WIDTHS:
        cases += [_case("core", model, stage, square, batch) for stage in stages]
        cases += [_case("core", model, 1, (800, 1280), 2), _case("core", model, 1, (2048, 2048), 1)]
    cases += [_case(operator, "tiny", 1, square, batch) for operator in ("states", "fusion")]
    cases += [_case("mixer", "tiny", stage, square, batch) for stage in stages]
    cases += [_case(name, "tiny", stage, square, batch) for name in SMALL for stage in (1, 3)]
    return [*cases, replace(_case("scan", "tiny", 1, square, min(batch, MAMBA_BATCH)), d_state=MAMBA_STATES)]


def _case(operator: str, model: str, stage: int, image: tuple[int, int], batch: int) -> Case:
    width, stride = WIDTHS[model] * 2 ** (stage - 1), 4 * 2 ** (stage - 1)
    name = f"{operator}/{model}/stage{stage}/{image[0]}x{image[1]}"
    dim = {"position": 1, "mlp": 1, "downsampling": 1}.get(operator, 2) * width
    return Case(name, operator, batch, image[0] // stride, image[1] // stride, dim, rank=math.ceil(width / 16))


def _initial(name: str, uniform: Tensor) -> Tensor:
    """The initial value of the weight ``name``, from values uniform in [0, 1)."""
    if name in ("step_bias", "delta_bias"):
        return 4.65 * uniform - 6.9  # softplus makes them nearly log-uniform in [1e-3, 1e-1]
    if name == "A":
        return -(0.5 + uniform) * torch.arange(1, uniform.shape[1] + 1, device=uniform.device)
    if name == "A_log":
        return torch.log(0.5 + uniform)
    if name in ("D", "kernels", "alpha"):
        return 0.5 + uniform
    return (2 * uniform - 1) * uniform[0].numel() ** -0.5  # PyTorch's default, which depends on the number of inputs
