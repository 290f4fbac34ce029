"""Who is timed: the backends, the compiled definition, and the published formulations in PyTorch.

All take the inputs of a case by name and give its output, of the same shapes. A planar competitor gets its tokens in
memory that runs over the image within each channel, (batch, dim, H, W), as the published code keeps them, so that it
is not charged for transposing them; the others get channels-last memory, (batch, H, W, dim).
"""

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
from .cases import DILATIONS, Case

DEFINITION, COMPILED = "torch", "torch.compile"
Fusion = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Competitor:
    """A function to time, and the backend that serves the operators in it."""

    name: str
    function: Callable[..., Tensor]
    backend: str
    planar: bool = False
    note: str = ""

    def bind(self, case: Case, inputs: dict[str, Tensor], grad_output: Tensor, backward: bool) -> Call:
        """A call that gives the output alone or, with ``backward``, the output and the gradients of all inputs."""
        tokens = case.activations()
        leaves = {name: self._lay_out(case, x) if name in tokens else x for name, x in inputs.items()}
        leaves = {name: x.detach().requires_grad_(backward) for name, x in leaves.items()}
        grad_output = self._lay_out(case, grad_output)

        def forward() -> tuple[Tensor, ...]:
            with backends.use_backend(self.backend), torch.no_grad():
                return (self.function(**leaves),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            with backends.use_backend(self.backend):  # which serves the backward pass too
                output = self.function(**leaves)
                return output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output)

        return forward_and_backward if backward else forward

    def _lay_out(self, case: Case, x: Tensor) -> Tensor:
        memory = torch.contiguous_format if self.planar else torch.channels_last
        if case.operator == "fusion":
            return x.contiguous(memory_format=memory)
        if case.operator not in ("states", "scan"):
            return x.permute(0, 3, 1, 2).contiguous(memory_format=memory).permute(0, 2, 3, 1)
        return x


def definition(case: Case) -> Competitor:
    """The definition in PyTorch, which all others are compared with."""
    return Competitor(DEFINITION, _OPERATORS[case.operator], DEFINITION)


def native(case: Case, names: Iterable[str]) -> list[Competitor]:
    """One competitor per backend that has kernels for the case."""
    return [Competitor(name, _OPERATORS[case.operator], name) for name in names if has_kernels(name, case)]


def compiled(case: Case) -> Competitor:
    """The definition under ``torch.compile``; the linear recurrence stays an operator of its own in it."""
    function = torch.compile(_OPERATORS[case.operator], fullgraph=True, dynamic=False)
    return Competitor(COMPILED, function, DEFINITION)


def published(case: Case, device: torch.device, dtype: torch.dtype) -> list[Competitor]:
    """The published formulations, built on the fastest scan that is here, since the published code has a native one."""
    backend = next(name for name in backends.PREFERENCE[device.type] if why_not(name, device, dtype) is None)
    note = f"scan: {backend}"
    if case.operator == "fusion":
        return [
            Competitor("published, 3 convolutions", partial(_fuse, three_convolutions), backend, planar=True),
            Competitor("published, dense 11x11", partial(_fuse, dense_convolution), backend, planar=True),
        ]
    if case.operator == "core":
        fusions = {
            "published, 3 convolutions": (three_convolutions, note),
            "published, dense 11x11": (dense_convolution, note),
            "separate operators": (state_fusion, f"scan, fusion: {backend}"),
        }
        return [
            Competitor(name, partial(_core_of_operators, fusion), backend, planar=True, note=note)
            for name, (fusion, note) in fusions.items()
        ]
    if case.operator == "mixer":
        return [Competitor("separate operators", _mixer_of_operators, backend, note=f"scan, fusion: {backend}")]
    libraries = {"conv": partial(_library_conv, F.silu), "position": _library_position, "norm": _library_norm}
    if case.operator in libraries:
        return [Competitor("library", libraries[case.operator], DEFINITION)]
    return []


def has_kernels(backend: str, case: Case) -> bool:
    """Whether a backend serves the operator itself: what CUDA lacks would be Triton's under another name."""
    return backend != "cuda" or case.operator not in ("conv", "position", "norm")


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a backend cannot be timed here, or None if it can."""
    if backend == "triton" and device.type == "cpu":
        return "Triton runs on the CPU only in its interpreter, which is for tests"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backends.why_not(backend, device.type, dtype, capability)


def three_convolutions(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """State fusion as the published code trains it: padded copies, dilated depthwise convolutions, a weighted sum."""
    branches = [
        weight * F.conv2d(F.pad(h, [dilation] * 4, mode="replicate"), kernel, dilation=dilation, groups=h.shape[1])
        for kernel, weight, dilation in zip(kernels, alpha, DILATIONS, strict=True)
    ]
    return sum(branches[1:], branches[0])


def dense_convolution(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """State fusion as the published code evaluates it: the kernels merged into one dense depthwise convolution."""
    return convolve_dense(h, merge_dense(kernels, alpha))


def merge_dense(kernels: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """The one kernel (dim, 1, 11, 11) that does what the dilated ones (dim, 1, 3, 3) do together."""
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
    fusion: Fusion,
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    alpha: Tensor,
    **kernels: Tensor,
) -> Tensor:
    """The core step by step: the step expanded by a product, the scan, the fusion, then C h + D u."""
    maps = u.permute(0, 3, 1, 2)  # (batch, dim, H, W)
    r, B, C = projection.permute(0, 3, 1, 2).flatten(2).split([step_weight.shape[1], 1, 1], dim=1)  # (batch, ., L)
    delta = step_weight.to(r.dtype) @ r
    A = -torch.exp(A_log)[:, None]
    states = selective_scan(maps.flatten(2), delta, A, B, delta_bias=step_bias, delta_softplus=True)
    h = states.squeeze(2).unflatten(2, maps.shape[2:])
    y = C.unflatten(2, maps.shape[2:]) * fusion(h, list(kernels.values()), alpha) + D[:, None, None] * maps
    return y.to(u.dtype).permute(0, 2, 3, 1)


def _fuse(fusion: Fusion, h: Tensor, alpha: Tensor, **kernels: Tensor) -> Tensor:
    return fusion(h.float(), list(kernels.values()), alpha).to(h.dtype)


def _core(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    alpha: Tensor,
    out_dtype: torch.dtype | None = None,
    **kernels: Tensor,
) -> Tensor:
    weights = (step_weight, step_bias, A_log, D)
    return structure_aware_scan(u, projection, *weights, list(kernels.values()), alpha, DILATIONS, out_dtype)


def _fusion(h: Tensor, alpha: Tensor, **kernels: Tensor) -> Tensor:
    return state_fusion(h, list(kernels.values()), alpha, DILATIONS)


def _depthwise_conv(epilogue: str, x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    return depthwise_conv(x, conv_weight, conv_bias, epilogue)


def _norm(y: Tensor, gate: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return gated_norm(y, gate, norm_weight, norm_bias)


def _mixer(xz: Tensor, alpha: Tensor, **weights: Tensor) -> Tensor:
    kernels = [weights.pop(f"kernel_{dilation}") for dilation in DILATIONS]
    return spatial_mixer(xz, **weights, kernels=kernels, alpha=alpha, dilations=DILATIONS)


def _mixer_of_operators(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    **core: Tensor,
) -> Tensor:
    """The fused core between PyTorch's own operators, as under autocast: all but the core and the norm in one dtype."""
    x, gate = xz.chunk(2, dim=-1)
    u = _library_conv(F.silu, x, conv_weight, conv_bias)
    y = _core(u, F.linear(u, projection_weight.to(u.dtype)), **core, out_dtype=norm_weight.dtype)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias).to(gate.dtype) * F.silu(gate)


def _library_conv(activation: Callable[[Tensor], Tensor], x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """PyTorch's depthwise convolution in the dtype of the tokens, channels last."""
    weight, bias = conv_weight.to(x.dtype), conv_bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])
    return activation(out.permute(0, 2, 3, 1))


def _library_position(x: Tensor, **conv: Tensor) -> Tensor:
    return _library_conv(x.add, x, **conv)


def _library_norm(y: Tensor, gate: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return F.layer_norm(y, norm_weight.shape, norm_weight.to(y.dtype), norm_bias.to(y.dtype)) * F.silu(gate)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "core": _core,
    "fusion": _fusion,
    "mixer": _mixer,
    "conv": partial(_depthwise_conv, "silu"),
    "position": partial(_depthwise_conv, "residual"),
    "norm": _norm,
    "states": partial(selective_scan, delta_softplus=True),
    "scan": partial(selective_scan, delta_softplus=True),
}
