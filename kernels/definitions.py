"""The back end "torch": the operators as back ends have them, made of the definitions and of autograd.

It serves operators that were recorded (``torch.export``) where a native library was, and run where none is;
and the second derivatives of all back ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import depthwise_conv_definition
from .gated_norm import gated_norm_definition
from .packing import unpack_weight
from .selective_scan import selective_scan_definition

_AUTOGRAD_KEYS = [getattr(torch._C.DispatchKey, f"Autograd{name}") for name in ("CPU", "CUDA", "MPS", "XPU", "Other")]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    out, last_state = selective_scan_definition(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    # A view of the states, which for one token is contiguous: outputs may not share memory.
    return out.contiguous(), last_state.clone(memory_format=torch.contiguous_format)


def state_fusion(h: Tensor, taps: Tensor, offsets: Sequence[int]) -> Tensor:
    """Every neighbour looked up by its clamped position: states (batch, H, W, dim), taps (T, dim)."""
    states = h.to(taps.dtype)
    height, width = h.shape[1:3]
    rows, columns = torch.arange(height, device=h.device), torch.arange(width, device=h.device)
    fused = torch.zeros_like(states)
    for tap, row, column in zip(taps, offsets[0::2], offsets[1::2], strict=True):
        i, j = (rows + row).clamp(0, height - 1), (columns + column).clamp(0, width - 1)
        fused = fused + tap * states[:, i[:, None], j]
    return fused.to(h.dtype)


def structure_aware_scan(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    offsets: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    u, projection = u.to(taps.dtype), projection.to(taps.dtype)
    height, width = u.shape[1:3]
    r, B, C = projection.split([step_weight.shape[1], 1, 1], dim=-1)
    raster = [x.flatten(1, 2).transpose(1, 2) for x in (u, F.linear(r, step_weight), B)]  # (batch, channels, L)
    states = selective_scan_definition(
        *raster[:2], -torch.exp(A_log)[:, None], raster[2], delta_bias=step_bias, delta_softplus=True
    )
    h = states.squeeze(2).unflatten(2, (height, width)).permute(0, 2, 3, 1)
    y = C * state_fusion(h, taps, offsets) + D * u
    row_states = F.pad(h[:, :-1, -1], (0, 0, 1, 0))  # before the first token of each row
    return y.to(out_dtype).contiguous(), row_states.contiguous()


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    return depthwise_conv_definition(x, weight.view(-1, 1, 3, 3), bias, epilogue)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return gated_norm_definition(y, gate, weight, bias, eps).contiguous()


def spatial_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    offsets: Sequence[int],
    eps: float,
) -> Tensor:
    """The outputs alone."""
    x, gate = xz.chunk(2, dim=-1)
    u = depthwise_conv(x, conv_weight, conv_bias, "silu")
    core = (u, F.linear(u, projection_weight), step_weight, step_bias, A_log, D, taps, offsets, taps.dtype)
    y, _ = structure_aware_scan(*core)
    return gated_norm(y, gate, norm_weight, norm_bias, eps)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    out = F.linear(x, unpack_weight(packed, outputs), bias)
    if relu:
        out = F.relu(out)
    return out if residual is None else residual + out


def packed_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
) -> Tensor:
    hidden = packed_linear(x, expand, len(expand_bias), expand_bias, norm_weight, norm_bias, eps, False, None)
    return packed_linear(F.gelu(hidden), project, len(project_bias), project_bias, None, None, 0.0, False, x)


def selective_scan_backward(
    grad_out: Tensor, grad_last: Tensor, *inputs: Any, create_graph: bool = False
) -> tuple[Tensor, ...]:
    return _gradients(selective_scan, inputs, (grad_out, grad_last), create_graph)


def state_fusion_backward(
    grad_out: Tensor, h: Tensor, taps: Tensor, offsets: Sequence[int], create_graph: bool = False
) -> tuple[Tensor, ...]:
    return _gradients(state_fusion, (h, taps, offsets), (grad_out,), create_graph)


def structure_aware_scan_backward(
    grad_out: Tensor,
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    row_states: Tensor,
    offsets: Sequence[int],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    inputs = (u, projection, step_weight, step_bias, A_log, D, taps, offsets, grad_out.dtype)
    return _gradients(structure_aware_scan, inputs, (grad_out,), create_graph)


def depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, grad_x: Tensor
) -> tuple[Tensor, ...]:
    grad, *grads = depthwise_conv_gradients(grad_out, x, weight, bias, epilogue)
    grad_x.copy_(grad)
    return tuple(grads)


def depthwise_conv_gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, create_graph: bool = False
) -> tuple[Tensor, ...]:
    return _gradients(depthwise_conv, (x, weight, bias, epilogue), (grad_out,), create_graph)


def gated_norm_backward(
    grad_out: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, grad_gate: Tensor
) -> tuple[Tensor, ...]:
    grad_y, grad, *grads = gated_norm_gradients(grad_out, y, gate, weight, bias, eps)
    grad_gate.copy_(grad)
    return grad_y, *grads


def gated_norm_gradients(
    grad_out: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, create_graph: bool = False
) -> tuple[Tensor, ...]:
    return _gradients(gated_norm, (y, gate, weight, bias, eps), (grad_out,), create_graph)


def spatial_mixer_gradients(grad_out: Tensor, *arguments: Any, create_graph: bool = False) -> tuple[Tensor, ...]:
    """From the arguments of ``spatial_mixer_backward``, of which the intermediates are made anew."""
    *tensors, _, _, _, _, offsets, eps = arguments
    return _gradients(spatial_mixer, (*tensors, offsets, eps), (grad_out,), create_graph)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Let autograd record, also inside an operator, below which PyTorch excludes it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _gradients(
    function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor], create_graph: bool
) -> tuple[Tensor, ...]:
    """Gradients of all tensors among ``inputs``, empty for absent ones, from those of the first outputs."""
    with torch.enable_grad(), _differentiable():
        if not create_graph:
            inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = torch.autograd.grad(
            outputs[: len(grads)], leaves, grads, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    by_leaf = iter(found)
    places = [x for x in inputs if isinstance(x, Tensor) or x is None]
    return tuple(
        next(by_leaf).contiguous() if x is not None and x.requires_grad else grads[0].new_empty(0) for x in places
    )
