"""Checks that all operators share: floating-point tensors, on one device."""

from collections.abc import Mapping

from torch import Tensor


def require_float(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise TypeError, naming the argument, for a tensor that does not hold real floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a real floating-point type, got {tensor.dtype}")


def require_same_device(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError, naming the argument, for a tensor on another device than the first."""
    first, *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in rest:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{name} must be on the device of {first[0]}, {first[1].device}, but is on {tensor.device}"
            )
