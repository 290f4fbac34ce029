"""The depthwise convolution of an inverted bottleneck: ReLU, depthwise 3x3 convolution of stride 2, ReLU."""

import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import CONV_FLOPS
from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, contiguous_as, layouts

LAYOUTS = layouts(x="batch, H, W, dim", weight="dim, 1, 3, 3", bias="dim")


def downsampling_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(conv(relu(x)))``, convolving each channel with its own 3x3 kernel (stride 2, zero padding).

    Computed in float32 (float64 for float64 input), also under autocast, and rounded once. The backward pass keeps
    only the inputs.

    Args:
        x: (batch, H, W, dim).
        weight: (dim, 1, 3, 3).
        bias: (dim,).

    Returns:
        The result, (batch, ceil(H / 2), ceil(W / 2), dim), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if a tensor is not of a real floating-point type.
    """
    check_tensors(LAYOUTS, dict(x=x, weight=weight, bias=bias))
    dtype = compute_dtype_for(x)
    return DOWNSAMPLING_CONV(x.contiguous(), contiguous_as(weight, dtype), contiguous_as(bias, dtype))


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The reference implementation, with weight and bias in the compute dtype."""
    maps = F.relu(x.to(weight.dtype)).permute(0, 3, 1, 2)  # (batch, dim, H, W), in channels-last memory
    out = F.conv2d(maps, weight, bias, stride=2, padding=1, groups=x.shape[-1])
    return F.relu(out).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def _fake(x: Tensor, *_: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    return x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, dim)


DOWNSAMPLING_CONV = Operator(
    "downsampling_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference,
    _fake,
    flops=lambda x, *_: CONV_FLOPS * x[0] * ((x[1] + 1) // 2) * ((x[2] + 1) // 2) * x[3],
)
