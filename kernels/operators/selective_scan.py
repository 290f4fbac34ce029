"""`selective_scan` for `torch.library`: u, delta, z (batch, dim, L), A (dim, N), B, C (batch, groups, N, L)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import definitions
from .dispatch import backend_of

# Per element and state: the exponential and its argument, the two products and the sum of the recurrence, and the
# product and the sum that read it out: the count of the published tables.
SCAN_FLOPS = 7


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
    return backend_of(u, "selective_scan").selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


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
    return backend_of(u, "selective_scan").selective_scan_backward(
        grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus
    )


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


@register_flop_formula(torch.ops.spatial_mamba.selective_scan)
def _selective_scan_flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any) -> int:
    return SCAN_FLOPS * u[0] * u[2] * A[0] * A[1]
