"""Depthwise 3x3 convolution of a map of tokens, channels last."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import at_token_stride, check_tensors, compute_dtype_for, contiguous_as, contiguous_like, layouts

EPILOGUES = ("none", "silu", "residual")
CONV_FLOPS = 2 * 9  # per element; the epilogue counts as zero, like all activations and sums
LAYOUTS = layouts(x="batch, H, W, dim", weight="dim, 1, 3, 3", bias="dim")


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "none") -> Tensor:
    """Convolve each channel with its own 3x3 kernel (cross-correlation, stride 1, zero padding).

    Computed in float32 (float64 for float64 input), also under autocast, and rounded once. The backward pass keeps
    only the inputs.

    Args:
        x: (batch, H, W, dim). Channels of a wider map, ``wide[..., a:b]``, are read in place.
        weight: (dim, 1, 3, 3).
        bias: (dim,).
        epilogue: what follows: ``"none"``; ``"silu"``, an activation; or ``"residual"``, the sum with ``x``.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not match, or the epilogue is unknown.
        TypeError: if a tensor is not of a real floating-point type.
    """
    check_tensors(LAYOUTS, dict(x=x, weight=weight, bias=bias))
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}, got {epilogue!r}")
    dtype = compute_dtype_for(x)
    return DEPTHWISE_CONV(x, contiguous_as(weight, dtype), contiguous_as(bias, dtype), epilogue)


def reference(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    """The reference implementation, with weight (dim, 1, 3, 3) or (dim, 9); weight and bias in the compute dtype."""
    tokens = x.to(weight.dtype)
    maps = tokens.permute(0, 3, 1, 2)  # (batch, dim, H, W), in channels-last memory
    kernels = weight.view(-1, 1, 3, 3)
    out = F.conv2d(maps, kernels, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    if epilogue == "silu":
        out = F.silu(out)
    elif epilogue == "residual":
        out = tokens + out
    return out.to(x.dtype).contiguous()


def _forward(backend: ModuleType, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return backend.depthwise_conv(at_token_stride(x), weight.view(-1, 9), *others)


def _backward(
    backend: ModuleType, grad_out: Tensor, x: Tensor, weight: Tensor, *others: Any, grad_x: Tensor | None = None
) -> Sequence[Tensor]:
    grad_x = contiguous_like(x) if grad_x is None else grad_x
    inputs = (at_token_stride(x), weight.view(-1, 9), *others)
    grad_weight, grad_bias = backend.depthwise_conv_backward(grad_out, *inputs, grad_x)
    return grad_x, grad_weight.view_as(weight), grad_bias


DEPTHWISE_CONV = Operator(
    "depthwise_conv(Tensor x, Tensor weight, Tensor bias, str epilogue) -> Tensor",
    reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    forward=_forward,
    backward=_backward,
    flops=lambda x, *_: CONV_FLOPS * math.prod(x),
)
