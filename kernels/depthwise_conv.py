"""Depthwise 3x3 convolution of a map of tokens, channels last: the public function, and its definition in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import require_float, require_same_device
from .precision import without_autocast

EPILOGUES = ("none", "silu", "residual")


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

    with without_autocast(x):
        weight, bias = weight.to(compute_dtype), bias.to(compute_dtype)
        if backends.definition_serves(x, "depthwise_conv"):
            return depthwise_conv_definition(x, weight, bias, epilogue)
        return torch.ops.spatial_mamba.depthwise_conv(x, weight.flatten(1).contiguous(), bias.contiguous(), epilogue)


def depthwise_conv_definition(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    """The definition; arguments and result as above, weights in the compute dtype."""
    tokens = x.to(weight.dtype)
    maps = tokens.permute(0, 3, 1, 2)  # (batch, dim, H, W), in channels-last memory
    out = F.conv2d(maps, weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    if epilogue == "silu":
        out = F.silu(out)
    elif epilogue == "residual":
        out = tokens + out
    return out.to(x.dtype).contiguous()


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
    tensors = dict(x=x, weight=weight, bias=bias)
    require_float(tensors)
    require_same_device(tensors)
