"""Tensor helpers shared by all operators: checks, the memory layout of tokens, and autocast switched off."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def check_tensors(tensors: Mapping[str, Tensor | None]) -> None:
    """Check that all are floating-point tensors on one device.

    Raises:
        TypeError: naming the argument that does not hold real floating-point numbers.
        ValueError: naming the argument on another device than the first.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a real floating-point type, got {tensor.dtype}")
    first, *others = given.items()
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{name} must be on the device of {first[0]}, {first[1].device}, but is on {tensor.device}"
            )


def at_token_stride(x: Tensor) -> Tensor:
    """Tokens (batch, H, W, dim) at strides (H W s, W s, s, 1), as kernels read them.

    Returned unchanged if they are contiguous channels of a wider map, else as a contiguous copy.
    """
    height, width, dim = x.shape[1:]
    stride = x.stride(2)
    if stride >= dim and x.stride() == (height * width * stride, width * stride, stride, 1):
        return x
    # Flattened because PyTorch does not normalise the strides of axes of length 1.
    return x.contiguous().flatten().view(x.shape)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on the device of a tensor; the meta device knows none."""
    if tensor.is_meta:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
