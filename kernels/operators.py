"""The operators of `torch.library`: schemas, shapes (fake forms), gradients and FLOPs, whichever back end runs them.

Activations are contiguous and of one dtype (float32, bfloat16, float16 or float64); weights, states and gradients of
weights are of the compute dtype, float32 (float64 for float64 activations). Shapes:

    u, delta, z (batch, dim, L)   A (dim, N)   B, C (batch, groups, N, L)        for selective_scan
    h (batch, H, W, dim)                                                         for state_fusion
    u (batch, H, W, dim)   projection (batch, H, W, R + 2)   step_weight (dim, R)   for structure_aware_scan
    taps (T, dim), offsets T pairs of (row, column)   D, A_log, biases (dim,)

Autocast leaves them alone: their accumulators are of the compute dtype whatever dtype comes in.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backends, definitions

# Per element and state: the exponential and its argument, the two products and the sum of the recurrence, and the
# product and the sum that read it out: the count of the published tables.
SCAN_FLOPS = 7


def _backend(tensor: Tensor) -> ModuleType:
    capability = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
    name = backends.serving(tensor.device.type, tensor.dtype, capability)
    if name == "torch":
        return definitions
    if name == "triton":
        from . import triton

        return triton
    return getattr(torch.ops, f"spatial_mamba_{name}")


# --- selective_scan ---------------------------------------------------------------------------------------------------


@custom_op(
    "spatial_mamba::selective_scan",
    mutates_args=(),
    schema=(
        "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "bool delta_softplus) -> (Tensor, Tensor)"
    ),
)
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
    """Outputs (batch, dim, L) in the dtype of u, or states (batch, dim, N, L) if C is None; last states."""
    return _backend(u).selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@custom_op(
    "spatial_mamba::selective_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? C, "
        "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def selective_scan_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; empty for those that are None."""
    return _backend(u).selective_scan_backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # noqa: ANN202
    out = torch.empty_like(u) if C is not None else A.new_empty(*u.shape[:2], A.shape[1], u.shape[2])
    return out, A.new_empty(*u.shape[:2], A.shape[1])


@selective_scan_backward.register_fake
def _(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # noqa: ANN202
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, A, B, C, D, z, delta_bias))


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _scan_backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    arguments = (grad_out.contiguous(), grad_last.contiguous(), *tensors, ctx.delta_softplus)
    if torch.is_grad_enabled():
        grads = definitions.selective_scan_backward(*arguments, create_graph=True)
    else:
        grads = selective_scan_backward(*arguments)
    return (*(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None)


selective_scan.register_autograd(_scan_backward, setup_context=_save_scan)


# --- state_fusion -----------------------------------------------------------------------------------------------------


@custom_op(
    "spatial_mamba::state_fusion",
    mutates_args=(),
    schema="(Tensor h, Tensor taps, int[] offsets) -> Tensor",
)
def state_fusion(h: Tensor, taps: Tensor, offsets: Sequence[int]) -> Tensor:
    """Fused states (batch, H, W, dim) in the dtype of h."""
    return _backend(h).state_fusion(h, taps, offsets)


@custom_op(
    "spatial_mamba::state_fusion_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor h, Tensor taps, int[] offsets) -> (Tensor, Tensor)",
)
def state_fusion_backward(grad_out: Tensor, h: Tensor, taps: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gradients of h and taps."""
    return _backend(h).state_fusion_backward(grad_out, h, taps, offsets)


@state_fusion.register_fake
def _(h, taps, offsets):  # noqa: ANN202
    return torch.empty_like(h)


@state_fusion_backward.register_fake
def _(grad_out, h, taps, offsets):  # noqa: ANN202
    return torch.empty_like(h), torch.empty_like(taps)


def _save_fusion(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, taps, ctx.offsets = inputs
    ctx.save_for_backward(h, taps)


def _fusion_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.offsets)
    if torch.is_grad_enabled():
        return *definitions.state_fusion_backward(*arguments, create_graph=True), None
    return *state_fusion_backward(*arguments), None


state_fusion.register_autograd(_fusion_backward, setup_context=_save_fusion)


# --- structure_aware_scan ---------------------------------------------------------------------------------------------


@custom_op(
    "spatial_mamba::structure_aware_scan",
    mutates_args=(),
    schema=(
        "(Tensor u, Tensor projection, Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, "
        "Tensor taps, int[] offsets, ScalarType out_dtype) -> (Tensor, Tensor)"
    ),
)
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
    """Outputs (batch, H, W, dim) in ``out_dtype``; the states (batch, H, dim) before the first token of each row.

    The second output is for the backward pass alone, which recomputes each row from it; it has no gradient.
    """
    return _backend(u).structure_aware_scan(u, projection, step_weight, step_bias, A_log, D, taps, offsets, out_dtype)


@custom_op(
    "spatial_mamba::structure_aware_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor u, Tensor projection, Tensor step_weight, Tensor step_bias, Tensor A_log, "
        "Tensor D, Tensor taps, Tensor row_states, int[] offsets)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, projection, step_weight, step_bias, A_log, D and taps."""
    return _backend(u).structure_aware_scan_backward(
        grad_out, u, projection, step_weight, step_bias, A_log, D, taps, row_states, offsets
    )


@structure_aware_scan.register_fake
def _(u, projection, step_weight, step_bias, A_log, D, taps, offsets, out_dtype):  # noqa: ANN202
    return torch.empty_like(u, dtype=out_dtype), taps.new_empty(u.shape[0], u.shape[1], u.shape[3])


@structure_aware_scan_backward.register_fake
def _(grad_out, u, projection, step_weight, step_bias, A_log, D, taps, row_states, offsets):  # noqa: ANN202
    return tuple(torch.empty_like(x) for x in (u, projection, step_weight, step_bias, A_log, D, taps))


def _save_core(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.offsets, _ = inputs
    _, row_states = output
    ctx.mark_non_differentiable(row_states)
    ctx.save_for_backward(*tensors, row_states)


def _core_backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.offsets)
    if torch.is_grad_enabled():
        return *definitions.structure_aware_scan_backward(*arguments, create_graph=True), None, None
    return *structure_aware_scan_backward(*arguments), None, None


structure_aware_scan.register_autograd(_core_backward, setup_context=_save_core)


# --- FLOPs, a multiply-add counted as two, as PyTorch's counter does --------------------------------------------------


@register_flop_formula(torch.ops.spatial_mamba.selective_scan)
def _selective_scan_flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any) -> int:
    return SCAN_FLOPS * u[0] * u[2] * A[0] * A[1]


@register_flop_formula(torch.ops.spatial_mamba.state_fusion)
def _state_fusion_flops(h: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * h[0] * h[1] * h[2] * taps[0] * taps[1]


@register_flop_formula(torch.ops.spatial_mamba.structure_aware_scan)
def _structure_aware_scan_flops(
    u: Sequence[int],
    projection: Sequence[int],
    step_weight: Sequence[int],
    step_bias: Sequence[int],
    A_log: Sequence[int],
    D: Sequence[int],
    taps: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    per_element = 2 * step_weight[1] + SCAN_FLOPS + 2 * taps[0]
    return u[0] * u[1] * u[2] * u[3] * per_element
