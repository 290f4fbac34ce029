"""The implementations compared: backends, the compiled reference implementation, the baseline, and PyTorch's operators.

All take the inputs of a case by name and return its output. Tokens are stored channels last, (batch, H, W, dim). For
``planar`` implementations each channel is contiguous, (batch, dim, H, W), as in the published code, so that it need not
transpose them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..depthwise_conv import depthwise_conv
from ..downsampling import downsampling
from ..gated_norm import gated_norm
from ..layer_norm import layer_norm
from ..mlp import mlp
from ..selective_scan import selective_scan
from ..spatial_mixer import spatial_mixer
from ..state_fusion import state_fusion
from ..structure_aware_scan import structure_aware_scan
from .cases import ACTIVATIONS, DILATIONS, Case, gradient_like
from .measure import dry_run

REFERENCE, COMPILED = "torch", "torch.compile"
Kernels = Tensor | Sequence[Tensor]  # (3, dim, 1, 3, 3)
OPERATORS: dict[str, Callable[..., Any]] = {
    "core": structure_aware_scan,
    "fusion": state_fusion,
    "mixer": spatial_mixer,
    "conv": partial(depthwise_conv, epilogue="silu"),
    "position": partial(depthwise_conv, epilogue="residual"),
    "downsampling": downsampling,
    "mlp": mlp,
    "norm": gated_norm,
    "layer": layer_norm,
    "states": partial(selective_scan, delta_softplus=True),
    "scan": partial(selective_scan, delta_softplus=True),
}


@dataclass(frozen=True)
class Implementation:
    """A function to time, and the backend that serves this package's operators in it."""

    name: str
    function: Callable[..., Tensor]
    backend: str
    planar: bool = False

    def bind(self, inputs: dict[str, Tensor], grad_output: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
        """A call that returns the output and, given its gradient, the gradients of all inputs."""
        is_map = "h" in inputs  # of state_fusion, which takes (batch, dim, H, W)
        leaves = {name: self._lay_out(x, is_map) if name in ACTIVATIONS else x for name, x in inputs.items()}
        leaves = {name: x.detach().requires_grad_(grad_output is not None) for name, x in leaves.items()}
        grad_output = None if grad_output is None else self._lay_out(grad_output, is_map)

        def call() -> tuple[Tensor, ...]:
            with backends.use_backend(self.backend), torch.set_grad_enabled(grad_output is not None):
                output = self.function(**leaves)
                if grad_output is None:
                    return (output,)
                return output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output)

        return call

    def _lay_out(self, x: Tensor, is_map: bool) -> Tensor:
        if x.ndim != 4:
            return x
        maps = x if is_map else x.permute(0, 3, 1, 2)
        maps = maps.contiguous(memory_format=torch.contiguous_format if self.planar else torch.channels_last)
        return maps if is_map else maps.permute(0, 2, 3, 1)


def implementations(case: Case, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    """All that can run here, the reference implementation first.

    The published code has a native scan. The baseline therefore uses the fastest scan that can run here.
    """
    operator = OPERATORS[case.operator]
    native = [name for name in backends.PREFERENCE[device.type] if why_not(name, device, dtype) is None]
    found = [Implementation(name, operator, name) for name in native[::-1] if has_kernels(name, case.operator)]
    found.append(Implementation(COMPILED, torch.compile(operator, fullgraph=True, dynamic=False), REFERENCE))
    if case.operator in ("core", "fusion"):
        fusions = {"baseline, 3 convolutions": three_convolutions, "baseline, dense 11x11": dense_convolution}
        function = _published_core if case.operator == "core" else _published_fusion
        found += [Implementation(name, partial(function, fusions[name]), native[0], planar=True) for name in fusions]
    if case.operator in LIBRARY:
        found.append(Implementation("library", LIBRARY[case.operator], native[0]))
    return found


def function_name(operator: str) -> str:
    """The name of the function behind an operator of a case."""
    function = OPERATORS[operator]
    return getattr(function, "func", function).__name__


def has_kernels(backend: str, operator: str) -> bool:
    """Whether a backend has kernels for an operator of a case. Those of the core serve the mixer."""
    if (backend, operator) == (REFERENCE, "layer"):  # PyTorch's own, which on CPUs is less exact in half precision
        return False
    return backends.implements(backend, function_name("core" if operator == "mixer" else operator))


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a backend cannot be timed here, or None if it can."""
    if backend == "triton" and device.type == "cpu":
        return "Triton runs on the CPU only in its interpreter, which is for tests"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backends.why_not(backend, device.type, dtype, capability)


class Check:
    """Compares implementations of a case with the reference implementation in float64.

    Args:
        device: the device that the implementations run on.
        compared_on: the device for everything else; by default the same.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, compared_on: torch.device | None = None
    ) -> None:
        self.device, self.compared_on = device, compared_on or device
        self.inputs = case.inputs(self.compared_on, dtype)
        reference = Implementation(REFERENCE, OPERATORS[case.operator], REFERENCE)
        self.grad_output = gradient_like(dry_run(reference.function, **self.inputs)[0])
        doubles = {name: x.double() for name, x in self.inputs.items()}
        self.expected = reference.bind(doubles, self.grad_output.double())()

    def worst(self, implementation: Implementation, backward: bool) -> tuple[float, str]:
        """The largest error of the output (and the gradients), relative to the largest magnitude, and its tensor.

        Raises:
            FloatingPointError: if a value is not finite.
        """
        inputs = {name: x.to(self.device) for name, x in self.inputs.items()}
        call = implementation.bind(inputs, self.grad_output.to(self.device) if backward else None)
        errors: dict[str, float] = {}
        names = ("output", *(f"gradient of {name}" for name in inputs))
        for name, x, expected in zip(names, call(), self.expected, strict=False):
            error = (x.to(self.compared_on).double() - expected).abs().max() / expected.abs().max()
            errors[name] = error.item()
            if not math.isfinite(errors[name]):
                raise FloatingPointError(f"{name} is not finite")
        where = max(errors, key=lambda name: errors[name])
        return errors[where], where


def published_core(
    fusion: Callable[[Tensor], Tensor], maps: Tensor, projected: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> Tensor:  # fmt: skip
    """The core in the published formulation, operation by operation.

    Delta is expanded by a matrix product; then come the scan, the fusion of the states, and C h + D u.

    Args:
        fusion: fuses states (batch, dim, H, W), float32.
        maps: u, (batch, dim, H, W).
        projected: (batch, R + 2, H W), R channels for delta, then B, then C.
        dt_weight, dt_bias: (dim, R) and (dim,).
        A: (dim, 1).
        D: (dim,).

    Returns:
        (batch, dim, H, W).
    """
    tokens = maps.flatten(2)
    r, B, C = projected.split([dt_weight.shape[1], 1, 1], dim=1)
    h: Any = selective_scan(tokens, dt_weight @ r, A, B, delta_bias=dt_bias, delta_softplus=True)
    fused = fusion(h.reshape(maps.shape))
    return (fused.flatten(2) * C + D[:, None] * tokens).reshape(maps.shape)


def three_convolutions(h: Tensor, kernels: Kernels, alpha: Tensor) -> Tensor:
    """State fusion as published for training: padded copies, dilated depthwise convolutions, and a weighted sum."""
    branches = [
        weight * F.conv2d(F.pad(h, [dilation] * 4, mode="replicate"), kernel, dilation=dilation, groups=h.shape[1])
        for kernel, weight, dilation in zip(kernels, alpha, DILATIONS, strict=True)
    ]
    return sum(branches[1:], branches[0])


def dense_convolution(h: Tensor, kernels: Kernels, alpha: Tensor) -> Tensor:
    """State fusion as published for evaluation: the kernels merged into one dense depthwise convolution."""
    return convolve_dense(h, merge_dense(kernels, alpha))


def merge_dense(kernels: Kernels, alpha: Tensor) -> Tensor:
    """Merge three kernels (dim, 1, 3, 3) at their dilations into one (dim, 1, 11, 11)."""
    reach = max(DILATIONS)
    merged = kernels[0].new_zeros(kernels[0].shape[0], 1, 2 * reach + 1, 2 * reach + 1)
    for kernel, weight, dilation in zip(kernels, alpha, DILATIONS, strict=True):
        grid = slice(reach - dilation, reach + dilation + 1, dilation)
        merged[:, :, grid, grid] += weight * kernel
    return merged


def convolve_dense(h: Tensor, merged: Tensor) -> Tensor:
    """Depthwise convolution of maps (batch, dim, H, W) with ``merge_dense``'s kernel and replicate padding."""
    return F.conv2d(F.pad(h, [max(DILATIONS)] * 4, mode="replicate"), merged, groups=h.shape[1])


def _published_core(
    fusion: Callable[..., Tensor], u: Tensor, projection: Tensor, step_weight: Tensor, step_bias: Tensor,
    A_log: Tensor, D: Tensor, **weights: Tensor,
) -> Tensor:  # fmt: skip
    maps, projected = u.permute(0, 3, 1, 2), projection.permute(0, 3, 1, 2).flatten(2)
    core = (step_weight.to(u.dtype), step_bias, -torch.exp(A_log)[:, None], D)
    return published_core(partial(fusion, **weights), maps, projected, *core).to(u.dtype).permute(0, 2, 3, 1)


def _published_fusion(fusion: Callable[..., Tensor], h: Tensor, **weights: Tensor) -> Tensor:
    return fusion(h.float(), **weights).to(h.dtype)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)


def _mixer(
    xz: Tensor, projection_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, **core: Any,
) -> Tensor:  # fmt: skip
    """The core between PyTorch's operators, with the dtypes of autocast."""
    x, gate = xz.chunk(2, dim=-1)
    u = F.silu(_conv(x, conv_weight, conv_bias))
    y = structure_aware_scan(u, F.linear(u, projection_weight.to(u.dtype)), **core, out_dtype=norm_weight.dtype)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias).to(gate.dtype) * F.silu(gate)


def _norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(y, weight.shape, weight.to(y.dtype), bias.to(y.dtype)) * F.silu(gate)


LIBRARY: dict[str, Callable[..., Tensor]] = {
    "mixer": _mixer,
    "conv": lambda x, weight, bias: F.silu(_conv(x, weight, bias)),
    "position": lambda x, weight, bias: x + _conv(x, weight, bias),
    "norm": _norm,
}
