"""The implementations that are timed: backends, the compiled reference implementation, and baselines in PyTorch.

All take the inputs of a case by name and give its output, of the same shapes. A planar one gets its tokens in memory
that runs over the image within each channel, (batch, dim, H, W), as the published code keeps them, so that it is not
charged for transposing them; the others get channels-last memory, (batch, H, W, dim).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..depthwise_conv import depthwise_conv
from ..gated_norm import gated_norm
from ..selective_scan import selective_scan
from ..spatial_mixer import spatial_mixer
from ..state_fusion import state_fusion
from ..structure_aware_scan import structure_aware_scan
from .cases import DILATIONS, Case, gradient_like
from .measure import dry_run, worst_error

REFERENCE = "torch"
Fusion = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A function to time, and the backend that serves the operators in it."""

    name: str
    function: Callable[..., Tensor]
    backend: str
    planar: bool = False
    note: str = ""

    def bind(
        self, case: Case, inputs: dict[str, Tensor], grad_output: Tensor | None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A call that gives the output and, for a gradient of it, the gradients of all inputs."""
        tokens = case.activations()
        leaves = {name: self._lay_out(case, x) if name in tokens else x for name, x in inputs.items()}
        leaves = {name: x.detach().requires_grad_(grad_output is not None) for name, x in leaves.items()}
        grad_output = None if grad_output is None else self._lay_out(case, grad_output)

        def call() -> tuple[Tensor, ...]:
            with backends.use_backend(self.backend), torch.set_grad_enabled(grad_output is not None):
                output = self.function(**leaves)
                if grad_output is None:
                    return (output,)
                return output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output)

        return call

    def _lay_out(self, case: Case, x: Tensor) -> Tensor:
        memory = torch.contiguous_format if self.planar else torch.channels_last
        if case.operator == "fusion":
            return x.contiguous(memory_format=memory)
        if case.operator not in ("states", "scan"):
            return x.permute(0, 3, 1, 2).contiguous(memory_format=memory).permute(0, 2, 3, 1)
        return x


def native(case: Case, names: Iterable[str]) -> list[Implementation]:
    """One implementation per backend that has kernels for the case."""
    return [Implementation(name, OPERATORS[case.operator], name) for name in names if has_kernels(name, case)]


def reference(case: Case) -> Implementation:
    """The reference implementation, which all others are compared with."""
    return Implementation(REFERENCE, OPERATORS[case.operator], REFERENCE)


def compiled(case: Case) -> Implementation:
    """The reference implementation compiled; the linear recurrence stays an operator of its own in it."""
    function = torch.compile(OPERATORS[case.operator], fullgraph=True, dynamic=False)
    return Implementation("torch.compile", function, REFERENCE)


def baselines(case: Case, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    """The published formulation, on the fastest scan that is here as the published code has a native one.

    For what the published code leaves to PyTorch: PyTorch's operators one after the other.
    """
    backend = next(name for name in backends.PREFERENCE[device.type] if why_not(name, device, dtype) is None)
    fusions = {"baseline, 3 convolutions": three_convolutions, "baseline, dense 11x11": dense_convolution}
    if case.operator in ("fusion", "core"):
        function, note = (_fuse, "") if case.operator == "fusion" else (_core_of_operators, f"scan: {backend}")
        return [
            Implementation(name, partial(function, fusion), backend, planar=True, note=note)
            for name, fusion in fusions.items()
        ]
    if case.operator == "mixer":
        return [Implementation("library", _mixer_of_operators, backend, note=f"scan, fusion: {backend}")]
    libraries = {"conv": partial(_library_conv, F.silu), "position": _library_position, "norm": _library_norm}
    if case.operator in libraries:
        return [Implementation("library", libraries[case.operator], REFERENCE)]
    return []


class Check:
    """Compares implementations of a case with the reference implementation in float64.

    Args:
        device: what the implementations run on.
        compared_on: what all else runs on, by default the same.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, compared_on: torch.device | None = None
    ) -> None:
        self.case, self.device, self.compared_on = case, device, compared_on or device
        self.inputs = case.inputs(self.compared_on, dtype)
        self.grad_output = gradient_like(dry_run(OPERATORS[case.operator], **self.inputs)[0], self.compared_on)
        doubles = {name: x.double() for name, x in self.inputs.items()}
        self.expected = reference(case).bind(case, doubles, self.grad_output.double())()

    def worst(self, implementation: Implementation, backward: bool) -> tuple[float, str]:
        """The worst error of the output (and the gradients), relative to its largest magnitude, and what it is in.

        Raises:
            FloatingPointError: if something is not finite.
        """
        inputs = {name: x.to(self.device) for name, x in self.inputs.items()}
        call = implementation.bind(self.case, inputs, self.grad_output.to(self.device) if backward else None)
        found = [x.to(self.compared_on) for x in call()]
        names = ["output", *(f"gradient of {name}" for name in inputs)]
        error, where = worst_error(names[: len(found)], found, self.expected[: len(found)])
        if not math.isfinite(error):
            raise FloatingPointError(f"{where} is not finite")
        return error, where


def has_kernels(backend: str, case: Case) -> bool:
    """Whether a backend serves the operator itself: what CUDA lacks would be Triton's under another name."""
    return backend != "cuda" or case.operator not in ("conv", "position", "norm")


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a backend cannot be timed here, or None if it can."""
    if backend == "triton" and device.type == "cpu":
        return "Triton runs on the CPU only in its interpreter, which is for tests"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backends.why_not(backend, device.type, dtype, capability)


def three_convolutions(h: Tensor, kernels: Tensor, alpha: Tensor) -> Tensor:
    """State fusion as the published code trains it: padded copies, dilated depthwise convolutions, a weighted sum."""
    branches = [
        weight * F.conv2d(F.pad(h, [dilation] * 4, mode="replicate"), kernel, dilation=dilation, groups=h.shape[1])
        for kernel, weight, dilation in zip(kernels, alpha, DILATIONS, strict=True)
    ]
    return sum(branches[1:], branches[0])


def dense_convolution(h: Tensor, kernels: Tensor, alpha: Tensor) -> Tensor:
    """State fusion as the published code evaluates it: the kernels merged into one dense depthwise convolution."""
    return convolve_dense(h, merge_dense(kernels, alpha))


def merge_dense(kernels: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """The one kernel (dim, 1, 11, 11) that does what the three dilated ones, each (dim, 1, 3, 3), do together."""
    reach = max(DILATIONS)
    merged = kernels[0].new_zeros(kernels[0].shape[0], 1, 2 * reach + 1, 2 * reach + 1)
    for kernel, weight, dilation in zip(kernels, alpha, DILATIONS, strict=True):
        grid = slice(reach - dilation, reach + dilation + 1, dilation)
        merged[:, :, grid, grid] += weight * kernel
    return merged


def convolve_dense(h: Tensor, merged: Tensor) -> Tensor:
    """The depthwise convolution of maps (batch, dim, H, W) with ``merge_dense``'s kernel, edges repeated."""
    return F.conv2d(F.pad(h, [max(DILATIONS)] * 4, mode="replicate"), merged, groups=h.shape[1])


def _core_of_operators(
    fusion: Fusion, u: Tensor, projection: Tensor, step_weight: Tensor, step_bias: Tensor, A_log: Tensor, D: Tensor,
    kernels: Tensor, alpha: Tensor,
) -> Tensor:  # fmt: skip
    """The core one by one: delta expanded by a product, the scan, the fusion, then C h + D u."""
    maps = u.permute(0, 3, 1, 2)  # (batch, dim, H, W)
    r, B, C = projection.permute(0, 3, 1, 2).flatten(2).split([step_weight.shape[1], 1, 1], dim=1)  # (batch, ., L)
    delta = step_weight.to(r.dtype) @ r
    A = -torch.exp(A_log)[:, None]
    states = selective_scan(maps.flatten(2), delta, A, B, delta_bias=step_bias, delta_softplus=True)
    h = states.squeeze(2).unflatten(2, maps.shape[2:])
    y = C.unflatten(2, maps.shape[2:]) * fusion(h, kernels, alpha) + D[:, None, None] * maps
    return y.to(u.dtype).permute(0, 2, 3, 1)


def _fuse(fusion: Fusion, h: Tensor, **weights: Tensor) -> Tensor:
    return fusion(h.float(), **weights).to(h.dtype)


def _mixer_of_operators(
    xz: Tensor, projection_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, **core: Tensor,
) -> Tensor:  # fmt: skip
    """The fused core between PyTorch's own operators, as under autocast: all but the core and the norm in one dtype."""
    x, gate = xz.chunk(2, dim=-1)
    u = _library_conv(F.silu, x, conv_weight, conv_bias)
    y = structure_aware_scan(u, F.linear(u, projection_weight.to(u.dtype)), **core, out_dtype=norm_weight.dtype)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias).to(gate.dtype) * F.silu(gate)


def _library_conv(activation: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's depthwise convolution in the dtype of the tokens, channels last."""
    maps = x.permute(0, 3, 1, 2)
    out = F.conv2d(maps, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=x.shape[-1])
    return activation(out.permute(0, 2, 3, 1))


def _library_position(x: Tensor, **conv: Tensor) -> Tensor:
    return _library_conv(x.add, x, **conv)


def _library_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(y, weight.shape, weight.to(y.dtype), bias.to(y.dtype)) * F.silu(gate)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "core": structure_aware_scan,
    "fusion": state_fusion,
    "mixer": spatial_mixer,
    "conv": partial(depthwise_conv, epilogue="silu"),
    "position": partial(depthwise_conv, epilogue="residual"),
    "norm": gated_norm,
    "states": partial(selective_scan, delta_softplus=True),
    "scan": partial(selective_scan, delta_softplus=True),
}
