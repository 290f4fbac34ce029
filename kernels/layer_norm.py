"""LayerNorm over the last axis, in one pass over memory on GPUs."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, layouts, without_autocast

LAYOUTS = layouts(weight="dim", bias="dim")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``F.layer_norm`` over the last axis. On GPUs the result has the dtype of ``x``, also under autocast.

    There it is computed in float32 (float64 for float64 input) and rounded once. The backward pass keeps only the
    inputs. On other devices this is a call of ``F.layer_norm``.

    Args:
        x: (..., dim).
        weight: (dim,), of any floating-point dtype.
        bias: (dim,), likewise.
        eps: added to the variance.

    Returns:
        The result, of the shape and dtype of ``x``, contiguous on GPUs.

    Raises:
        ValueError: on GPUs, if shapes or devices do not match.
        TypeError: on GPUs, if a tensor is not of a real floating-point type.
    """
    if not x.is_cuda:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    if torch.compiler.is_compiling():  # compilers fuse the norm with what surrounds it
        with without_autocast(x):
            return reference(x, weight, bias, eps)
    check_tensors(LAYOUTS, dict(x=x, weight=weight, bias=bias), dim=x.shape[-1])
    return LAYER_NORM(x, weight, bias, eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The reference implementation."""
    dtype = compute_dtype_for(x)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def _forward(backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return backend.layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def _backward(backend: ModuleType, grad_out: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return backend.layer_norm_backward(grad_out, x.contiguous(), weight.contiguous(), *others)


# No FLOPs: PyTorch's counter has none for norms.
LAYER_NORM = Operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    forward=_forward,
    backward=_backward,
)
