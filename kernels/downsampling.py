"""Downsampling between stages: two linear layers with a depthwise convolution of stride 2 between them."""

from collections.abc import Sequence
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import CONV_FLOPS
from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, contiguous_as, layouts

DOWNSAMPLING_TENSORS = (  # in schemas
    "Tensor x, Tensor expand, Tensor expand_bias, Tensor conv_weight, Tensor conv_bias, Tensor project, "
    "Tensor project_bias"
)
LAYOUTS = layouts(
    x="batch, H, W, dim",
    expand="hidden, dim",
    expand_bias="hidden",
    conv_weight="hidden, 1, 3, 3",
    conv_bias="hidden",
    project="outputs, hidden",
    project_bias="outputs",
)


def downsampling(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """``linear(relu(conv(relu(linear(x)))))``, with a depthwise 3x3 convolution of stride 2 and zero padding.

    The convolution is computed in float32 (float64 for float64 input), also under autocast. Native backends keep only
    the inputs for the backward pass; on CPUs they compute the hidden map in parts that stay in the cache.

    Args:
        x: (batch, H, W, dim).
        expand: (hidden, dim).
        expand_bias: (hidden,).
        conv_weight: (hidden, 1, 3, 3).
        conv_bias: (hidden,).
        project: (outputs, hidden).
        project_bias: (outputs,).

    Returns:
        The result, (batch, ceil(H / 2), ceil(W / 2), outputs), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if a tensor is not of a real floating-point type.
    """
    tensors = dict(
        expand=expand,
        expand_bias=expand_bias,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        project=project,
        project_bias=project_bias,
    )
    check_tensors(LAYOUTS, dict(x=x, **tensors))
    compute_dtype = compute_dtype_for(x)
    converted = (
        contiguous_as(tensor, compute_dtype if name.startswith("conv") else x.dtype) for name, tensor in tensors.items()
    )
    return DOWNSAMPLING(x.contiguous(), *converted)


def reference(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """The reference implementation. Weight and bias of the convolution have the compute dtype, the others that of x."""
    hidden = F.relu(F.linear(x, expand, expand_bias)).to(conv_weight.dtype)
    maps = hidden.permute(0, 3, 1, 2)  # (batch, hidden, H, W), in channels-last memory
    sampled = F.relu(F.conv2d(maps, conv_weight, conv_bias, stride=2, padding=1, groups=len(conv_bias)))
    return F.linear(sampled.permute(0, 2, 3, 1).to(x.dtype), project, project_bias)


def halved(size: int) -> int:
    """Rows or columns of the result."""
    return (size + 1) // 2


def flops(x: Sequence[int], hidden: int, outputs: int) -> int:
    """FLOPs for x of this shape."""
    batch, height, width, dim = x
    sampled = halved(height) * halved(width) * (CONV_FLOPS + 2 * outputs)
    return batch * hidden * (2 * height * width * dim + sampled)


def fake(x: Tensor, *weights: Tensor) -> Tensor:
    """An empty tensor like the result."""
    batch, height, width, _ = x.shape
    return x.new_empty(batch, halved(height), halved(width), len(weights[-1]))


def _backward(backend: ModuleType, grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return *backend.downsampling_backward(grad_out, *inputs[:-1]), grad_out.sum((0, 1, 2))


DOWNSAMPLING = Operator(
    f"downsampling({DOWNSAMPLING_TENSORS}) -> Tensor",
    reference,
    fake,
    backward=_backward,
    flops=lambda x, expand, *others: flops(x, expand[0], others[-1][0]),
)
