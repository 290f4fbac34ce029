"""LayerNorm over channels, gated: ``layer_norm(y) * silu(gate)``."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import at_token_stride, check_tensors, compute_dtype_for, contiguous_as, contiguous_like, layouts

LAYOUTS = layouts(y="batch, H, W, dim", gate="batch, H, W, dim", weight="dim", bias="dim")


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``layer_norm(y, weight, bias) * silu(gate)``, normalised over the channels of each token.

    Computed in float32 (float64 for a float64 gate), also under autocast, and rounded once. The backward pass keeps
    only the inputs.

    Args:
        y: (batch, H, W, dim). It may have a wider dtype than the gate, so that it need not be rounded first.
        gate: (batch, H, W, dim). Channels of a wider map, ``wide[..., a:b]``, are read in place.
        weight: (dim,).
        bias: (dim,).
        eps: added to the variance.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``gate``.

    Raises:
        ValueError: if shapes or devices do not match, or the CUDA backend gets more than 4096 channels.
        TypeError: if a tensor is not of a real floating-point type.
    """
    check_tensors(LAYOUTS, dict(y=y, gate=gate, weight=weight, bias=bias))
    compute_dtype = compute_dtype_for(gate)
    y = contiguous_as(y, gate.dtype if y.dtype == gate.dtype else compute_dtype)
    return GATED_NORM(y, gate, contiguous_as(weight, compute_dtype), contiguous_as(bias, compute_dtype), eps)


def reference(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The reference implementation, with weight and bias in the compute dtype."""
    normed = F.layer_norm(y.to(weight.dtype), weight.shape, weight, bias, eps)
    return (normed * F.silu(gate.to(weight.dtype))).to(gate.dtype)


def _forward(backend: ModuleType, y: Tensor, gate: Tensor, *others: Any) -> Tensor:
    return backend.gated_norm(y, at_token_stride(gate), *others)


def _backward(
    backend: ModuleType, grad_out: Tensor, y: Tensor, gate: Tensor, *others: Any, grad_gate: Tensor | None = None
) -> Sequence[Tensor]:
    grad_gate = contiguous_like(gate) if grad_gate is None else grad_gate
    grad_y, *grads = backend.gated_norm_backward(grad_out, y, at_token_stride(gate), *others, grad_gate)
    return grad_y, grad_gate, *grads


# No FLOPs: PyTorch's counter has none for norms and activations.
GATED_NORM = Operator(
    "gated_norm(Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference,
    fake=lambda y, gate, *_: gate.new_empty(gate.shape),
    forward=_forward,
    backward=_backward,
)
