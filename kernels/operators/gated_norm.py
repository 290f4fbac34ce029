"""`gated_norm` for `torch.library`: y and gate (batch, H, W, dim), weight and bias (dim,).

y is of the gate's dtype or of the compute dtype. No FLOPs: PyTorch's counter has none for norms and activations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .. import definitions
from .dispatch import at_token_stride, backend_of


@custom_op(
    "spatial_mamba::gated_norm",
    mutates_args=(),
    schema="(Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps) -> Tensor",
)
def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalised and gated tokens (batch, H, W, dim), contiguous, in the gate's dtype."""
    return backend_of(gate, "gated_norm").gated_norm(y, at_token_stride(gate), weight, bias, eps)


@custom_op(
    "spatial_mamba::gated_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def gated_norm_backward(
    grad_out: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, gate, weight and bias."""
    grad_gate = gate.new_empty(gate.shape)
    arguments = (grad_out, y, at_token_stride(gate), weight, bias, eps, grad_gate)
    grad_y, *grads = backend_of(gate, "gated_norm").gated_norm_backward(*arguments)
    return grad_y, grad_gate, *grads


@gated_norm.register_fake
def _(y, gate, weight, bias, eps):  # noqa: ANN202
    return gate.new_empty(gate.shape)


@gated_norm_backward.register_fake
def _(grad_out, y, gate, weight, bias, eps):  # noqa: ANN202
    return torch.empty_like(y), gate.new_empty(gate.shape), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (grad_out.contiguous(), *ctx.saved_tensors, ctx.eps)
    if torch.is_grad_enabled():
        return *definitions.gated_norm_gradients(*arguments, create_graph=True), None
    return *gated_norm_backward(*arguments), None


gated_norm.register_autograd(_backward, setup_context=_save)
