"""`structure_aware_scan` for `torch.library`: u (batch, H, W, dim), projection (batch, H, W, R + 2).

step_weight (dim, R), taps (T, dim), offsets T pairs of (row, column); step_bias, A_log and D (dim,).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import definitions
from .dispatch import backend_of
from .selective_scan import SCAN_FLOPS


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
    return backend_of(u, "structure_aware_scan").structure_aware_scan(
        u, projection, step_weight, step_bias, A_log, D, taps, offsets, out_dtype
    )


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
    inputs = (u, projection, step_weight, step_bias, A_log, D, taps, row_states, offsets)
    return backend_of(u, "structure_aware_scan").structure_aware_scan_backward(grad_out, *inputs)


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
    ctx.set_materialize_grads(False)  # no zeros in place of the gradient that there is none of
    ctx.save_for_backward(*tensors, row_states)


def _core_backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.offsets)
    if torch.is_grad_enabled():
        return *definitions.structure_aware_scan_backward(*arguments, create_graph=True), None, None
    return *structure_aware_scan_backward(*arguments), None, None


structure_aware_scan.register_autograd(_core_backward, setup_context=_save_core)


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
