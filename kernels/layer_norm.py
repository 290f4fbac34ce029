"""LayerNorm over the last axis, in one pass over memory on GPUs."""

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, contiguous_as, layouts, without_autocast

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
        ValueError: on GPUs, if shapes or devices do not match, or the CUDA backend gets more than 4096 channels.
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
    return backend.layer_norm(x.contiguous(), *_native(weight, bias), eps)


def _backward(
    backend: ModuleType, grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    grad_x, *grads = backend.layer_norm_backward(grad_out, x.contiguous(), *_native(weight, bias), eps)
    return grad_x, *(grad.to(of.dtype) for grad, of in zip(grads, (weight, bias), strict=True))


def _native(*weights: Tensor) -> Iterator[Tensor]:
    """Contiguous, and of a dtype that backends for GPUs have."""
    return (contiguous_as(x, torch.float32 if x.dtype == torch.float64 else x.dtype) for x in weights)


# No FLOPs: PyTorch's counter has none for norms.
LAYER_NORM = Operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    forward=_forward,
    backward=_backward,
)
