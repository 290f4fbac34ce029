"""A linear layer without bias."""

import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import check_last_axis, check_tensors, contiguous_as, layouts

LAYOUTS = layouts(weight="outputs, inputs")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear(x, weight.to(x.dtype))``.

    Large products in float32, also those of the gradients, use oneDNN's microkernels where PyTorch exports them.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).

    Returns:
        The result, (..., outputs), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if a tensor is not of a real floating-point type.
    """
    check_last_axis(x, check_tensors(LAYOUTS, dict(x=x, weight=weight))["inputs"])
    out = LINEAR(x.reshape(-1, x.shape[-1]).contiguous(), contiguous_as(weight, x.dtype))
    return out.view(*x.shape[:-1], out.shape[1])


LINEAR = Operator(
    "linear(Tensor x, Tensor weight) -> Tensor",
    reference=F.linear,
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    flops=lambda x, weight, *_: 2 * x[0] * weight[0] * weight[1],
)
