"""`state_fusion` for `torch.library`: h (batch, H, W, dim), taps (T, dim), offsets T pairs of (row, column)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import definitions
from .dispatch import backend_of


@custom_op(
    "spatial_mamba::state_fusion",
    mutates_args=(),
    schema="(Tensor h, Tensor taps, int[] offsets) -> Tensor",
)
def state_fusion(h: Tensor, taps: Tensor, offsets: Sequence[int]) -> Tensor:
    """Fused states (batch, H, W, dim) in the dtype of h."""
    return backend_of(h, "state_fusion").state_fusion(h, taps, offsets)


@custom_op(
    "spatial_mamba::state_fusion_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor h, Tensor taps, int[] offsets) -> (Tensor, Tensor)",
)
def state_fusion_backward(grad_out: Tensor, h: Tensor, taps: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gradients of h and taps."""
    return backend_of(h, "state_fusion").state_fusion_backward(grad_out, h, taps, offsets)


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


@register_flop_formula(torch.ops.spatial_mamba.state_fusion)
def _state_fusion_flops(h: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * h[0] * h[1] * h[2] * taps[0] * taps[1]
