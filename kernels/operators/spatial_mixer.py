"""`spatial_mixer` for `torch.library`: the other operators in a row, with one gradient for both halves of its input.

xz (batch, H, W, 2 dim), the tokens and then their gate; conv_weight (dim, 9); projection_weight (R + 2, dim), in the
dtype of xz; step_weight (dim, R); taps (T, dim), offsets T pairs of (row, column); all other weights (dim,).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import definitions
from ..precision import without_autocast
from .depthwise_conv import CONV_FLOPS
from .dispatch import at_token_stride, backend_of
from .selective_scan import SCAN_FLOPS

_INPUTS = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor projection_weight, Tensor step_weight, Tensor step_bias, "
    "Tensor A_log, Tensor D, Tensor taps, Tensor norm_weight, Tensor norm_bias"
)
_TENSORS = _INPUTS.count("Tensor")


@custom_op(
    "spatial_mamba::spatial_mixer",
    mutates_args=(),
    schema=f"({_INPUTS}, int[] offsets, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (batch, H, W, dim) in the dtype of xz; u, projection, y and row_states, see ``structure_aware_scan``.

    All but the first are for the backward pass alone; they have no gradient.
    """
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    u = backend_of(xz, "depthwise_conv").depthwise_conv(x, conv_weight, conv_bias, "silu")
    with without_autocast(xz):
        projection = u @ projection_weight.t()
    core = (u, projection, step_weight, step_bias, A_log, D, taps, offsets, taps.dtype)
    y, row_states = backend_of(xz, "structure_aware_scan").structure_aware_scan(*core)
    out = backend_of(xz, "gated_norm").gated_norm(y, gate, norm_weight, norm_bias, eps)
    return out, u, projection, y, row_states


@custom_op(
    "spatial_mamba::spatial_mixer_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_out, {_INPUTS}, Tensor u, Tensor projection, Tensor y, Tensor row_states, int[] offsets, "
        f"float eps) -> ({', '.join(['Tensor'] * _TENSORS)})"
    ),
)
def spatial_mixer_backward(
    grad_out: Tensor,
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
    u: Tensor,
    projection: Tensor,
    y: Tensor,
    row_states: Tensor,
    offsets: Sequence[int],
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors from xz to norm_bias; the halves of the first are written where they belong."""
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    grad_xz = xz.new_empty(xz.shape)
    grad_x, grad_gate = grad_xz.chunk(2, dim=-1)

    grad_y, grad_norm_weight, grad_norm_bias = backend_of(xz, "gated_norm").gated_norm_backward(
        grad_out, y, gate, norm_weight, norm_bias, eps, grad_gate
    )
    core = (u, projection, step_weight, step_bias, A_log, D, taps, row_states, offsets)
    grad_u, grad_projection, *core_grads, grad_taps = backend_of(
        xz, "structure_aware_scan"
    ).structure_aware_scan_backward(grad_y, *core)
    del grad_y
    with without_autocast(xz):
        flat = grad_projection.flatten(0, 2)
        grad_u.flatten(0, 2).addmm_(flat, projection_weight)
        grad_projection_weight = flat.t() @ u.flatten(0, 2)
    grad_conv_weight, grad_conv_bias = backend_of(xz, "depthwise_conv").depthwise_conv_backward(
        grad_u, x, conv_weight, conv_bias, "silu", grad_x
    )
    conv_grads = (grad_conv_weight, grad_conv_bias)
    return grad_xz, *conv_grads, grad_projection_weight, *core_grads, grad_taps, grad_norm_weight, grad_norm_bias


@spatial_mixer.register_fake
def _(xz, conv_weight, conv_bias, projection_weight, step_weight, *weights_offsets_and_eps):  # noqa: ANN202
    *image, channels = xz.shape
    dim = channels // 2
    out, u = xz.new_empty(*image, dim), xz.new_empty(*image, dim)
    projection = xz.new_empty(*image, projection_weight.shape[0])
    return out, u, projection, step_weight.new_empty(*image, dim), step_weight.new_empty(*image[:2], dim)


@spatial_mixer_backward.register_fake
def _(grad_out, xz, *inputs):  # noqa: ANN202
    return xz.new_empty(xz.shape), *(torch.empty_like(x) for x in inputs[: _TENSORS - 1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.offsets, ctx.eps = inputs
    _, *intermediates = output
    ctx.mark_non_differentiable(*intermediates)
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients that there are none of
    ctx.save_for_backward(*tensors, *intermediates)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (_TENSORS + 2)
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.offsets, ctx.eps)
    if torch.is_grad_enabled():
        return *definitions.spatial_mixer_gradients(*arguments, create_graph=True), None, None
    return *spatial_mixer_backward(*arguments), None, None


spatial_mixer.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.spatial_mamba.spatial_mixer)
def _flops(
    xz: Sequence[int],
    conv_weight: Sequence[int],
    conv_bias: Sequence[int],
    projection_weight: Sequence[int],
    step_weight: Sequence[int],
    step_bias: Sequence[int],
    A_log: Sequence[int],
    D: Sequence[int],
    taps: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    core = 2 * step_weight[1] + SCAN_FLOPS + 2 * taps[0]
    per_element = CONV_FLOPS + 2 * projection_weight[0] + core
    return xz[0] * xz[1] * xz[2] * conv_bias[0] * per_element
