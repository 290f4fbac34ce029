"""Depthwise 3x3 convolution of a map of tokens, channels last."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import at_token_stride, check_tensors

EPILOGUES = ("none", "silu", "residual")
CONV_FLOPS = 2 * 9  # per element; the epilogue counts nothing, as activations and sums do not


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "none") -> Tensor:
    """Convolve each channel with a 3x3 kernel of its own (cross-correlation, stride 1, zeros around the map).

    Computed in float32 (float64 for float64 input), also under autocast, and rounded once. The backward pass keeps the
    inputs alone.

    Args:
        x: (batch, H, W, dim). Channels of a wider map, ``wide[..., a:b]``, are read where they are.
        weight: (dim, 1, 3, 3).
        bias: (dim,).
        epilogue: what follows: ``"none"``; ``"silu"``, the activation; or ``"residual"``, adding ``x``.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not fit together, or for another epilogue.
        TypeError: for a tensor that is not of a floating-point type.
    """
    _check_arguments(x, weight, bias, epilogue)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.flatten(1).to(compute_dtype), bias.to(compute_dtype)
    return DEPTHWISE_CONV(x, weight.contiguous(), bias.contiguous(), epilogue)


def reference(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    """The reference implementation; weight (dim, 9), weights in the compute dtype."""
    tokens = x.to(weight.dtype)
    maps = tokens.permute(0, 3, 1, 2)  # (batch, dim, H, W), in channels-last memory
    kernels = weight.view(-1, 1, 3, 3)
    out = F.conv2d(maps, kernels, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    if epilogue == "silu":
        out = F.silu(out)
    elif epilogue == "residual":
        out = tokens + out
    return out.to(x.dtype).contiguous()


def _forward(backend: ModuleType, x: Tensor, *others: Any) -> Tensor:
    return backend.depthwise_conv(at_token_stride(x), *others)


def _backward(
    backend: ModuleType, grad_out: Tensor, x: Tensor, *others: Any, grad_x: Tensor | None = None
) -> Sequence[Tensor]:
    grad_x = x.new_empty(x.shape) if grad_x is None else grad_x
    return grad_x, *backend.depthwise_conv_backward(grad_out, at_token_stride(x), *others, grad_x)


def _flops(x: Sequence[int], *_: Any) -> int:
    return CONV_FLOPS * x[0] * x[1] * x[2] * x[3]


DEPTHWISE_CONV = Operator(
    "depthwise_conv(Tensor x, Tensor weight, Tensor bias, str epilogue) -> Tensor",
    reference,
    _forward,
    fake=lambda x, *_: x.new_empty(x.shape),
    backward=_backward,
    flops=_flops,
)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (batch, H, W, dim), none but batch zero, got {tuple(x.shape)}")
    dim = x.shape[-1]
    if tuple(weight.shape) != (dim, 1, 3, 3):
        raise ValueError(f"weight must be (dim, 1, 3, 3) = {(dim, 1, 3, 3)}, got {tuple(weight.shape)}")
    if tuple(bias.shape) != (dim,):
        raise ValueError(f"bias must be (dim,) = {(dim,)}, got {tuple(bias.shape)}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}, got {epilogue!r}")
    check_tensors(dict(x=x, weight=weight, bias=bias))
