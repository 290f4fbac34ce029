"""`depthwise_conv` for `torch.library`: x (batch, H, W, dim), weight (dim, 9), bias (dim,)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import definitions
from .dispatch import at_token_stride, backend_of

CONV_FLOPS = 2 * 9  # per element; the epilogue counts nothing, as activations and sums do not


@custom_op(
    "spatial_mamba::depthwise_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, str epilogue) -> Tensor",
)
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    """Convolved tokens (batch, H, W, dim), contiguous, in the dtype of x."""
    return backend_of(x, "depthwise_conv").depthwise_conv(at_token_stride(x), weight, bias, epilogue)


@custom_op(
    "spatial_mamba::depthwise_conv_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, str epilogue) -> (Tensor, Tensor, Tensor)",
)
def depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad_x = x.new_empty(x.shape)
    arguments = (grad_out, at_token_stride(x), weight, bias, epilogue, grad_x)
    return grad_x, *backend_of(x, "depthwise_conv").depthwise_conv_backward(*arguments)


@depthwise_conv.register_fake
def _(x, weight, bias, epilogue):  # noqa: ANN202
    return x.new_empty(x.shape)


@depthwise_conv_backward.register_fake
def _(grad_out, x, weight, bias, epilogue):  # noqa: ANN202
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.epilogue = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.epilogue)
    if torch.is_grad_enabled():
        return *definitions.depthwise_conv_gradients(*arguments, create_graph=True), None
    return *depthwise_conv_backward(*arguments), None


depthwise_conv.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.spatial_mamba.depthwise_conv)
def _flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    return CONV_FLOPS * x[0] * x[1] * x[2] * x[3]
