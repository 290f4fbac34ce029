"""Tensor helpers shared by all operators: checks, the memory layout of tokens, and switching autocast off."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends import is_traced

MOST_REMEMBERED = 1024  # combinations of shapes in a `Layouts`
Layout = list[tuple[str, int, str, int]]  # per axis: text, factor, name, offset of factor * sizes[name] + offset


@dataclass
class Layouts:
    """Layouts by name of the tensor, and the axis sizes for shapes that were checked before."""

    expected: dict[str, Layout]
    checked: dict[tuple[Any, ...], dict[str, int]] = field(default_factory=dict)


def layouts(**texts: str) -> Layouts:
    """Parse the axes of tensors for `check_tensors`, such as ``"batch, H, W, 2 dim"`` or ``"R + 2, dim"``."""
    return Layouts({name: [_parse_axis(axis) for axis in text.split(", ")] for name, text in texts.items()})


def _parse_axis(text: str) -> tuple[str, int, str, int]:
    match text.split():
        case [factor, name]:
            return text, int(factor), name, 0
        case [name, "+", offset]:
            return text, 1, name, int(offset)
    return (text, 0, "", int(text)) if text.isdecimal() else (text, 1, text, 0)


def check_tensors(layouts: Layouts, tensors: Mapping[str, Tensor | None], **sizes: int) -> Mapping[str, int]:
    """Check arguments: their shapes, that they hold floating-point numbers, and that they are on one device.

    Args:
        layouts: from `layouts`, checked in this order. The first tensor with an axis sets its size, which must be at
            least 1, except for ``batch``.
        tensors: by name; None is skipped. Tensors without a layout may have any shape.
        sizes: axes whose sizes are known.

    Returns:
        The sizes of all axes.

    Raises:
        ValueError: if a shape does not fit, or a tensor is not on the device of the first.
        TypeError: if a tensor is not of a real floating-point type.
    """
    # Shapes in a trace may hold symbols, which cannot serve as keys.
    sizes = _sizes(layouts.expected, tensors, sizes) if is_traced() else _remembered_sizes(layouts, tensors, sizes)
    first = device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a real floating-point type, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, but is on {tensor.device}")
    return sizes


def _remembered_sizes(layouts: Layouts, tensors: Mapping[str, Tensor | None], sizes: dict[str, int]) -> dict[str, int]:
    """Like `_sizes`, but microseconds faster for shapes that were checked before."""
    given = (None if (x := tensors.get(name)) is None else x.shape for name in layouts.expected)
    key = (*sizes.items(), *given)
    found = layouts.checked.get(key)
    if found is None:
        found = _sizes(layouts.expected, tensors, sizes)
        if len(layouts.checked) >= MOST_REMEMBERED:
            layouts.checked.clear()
        layouts.checked[key] = found
    return found


def _sizes(
    expected: Mapping[str, Layout], tensors: Mapping[str, Tensor | None], sizes: dict[str, int]
) -> dict[str, int]:
    for name, layout in expected.items():
        tensor, known = tensors.get(name), len(sizes)
        if tensor is not None and not _fits(tensor.shape, layout, sizes):
            raise ValueError(_mismatch(name, tuple(tensor.shape), layout, dict(list(sizes.items())[:known])))
    return sizes


def _fits(shape: Sequence[int], layout: Layout, sizes: dict[str, int]) -> bool:
    """Whether a shape has this layout. Axes that are new are added to ``sizes``."""
    if len(shape) != len(layout):
        return False
    for size, (_, factor, axis, offset) in zip(shape, layout, strict=True):
        if factor and axis not in sizes:
            sizes[axis] = (size - offset) // factor
            if sizes[axis] < 1 and axis != "batch":
                return False
        if size != (factor * sizes[axis] + offset if factor else offset):
            return False
    return True


def _mismatch(name: str, shape: tuple[int, ...], layout: Layout, known: Mapping[str, int]) -> str:
    names = dict.fromkeys(axis for _, _, axis, _ in layout if axis)
    conditions = [f"{axis} = {known[axis]}" for axis in names if axis in known]
    if free := [axis for axis in names if axis not in known and axis != "batch"]:
        conditions.append(f"{', '.join(free)} >= 1")
    axes = ", ".join(text for text, *_ in layout)
    return f"{name} must have shape ({axes}) with {', '.join(conditions)}, got {shape}"


def at_token_stride(x: Tensor) -> Tensor:
    """Tokens (batch, H, W, dim) at strides (H W s, W s, s, 1), as kernels read them.

    Returned unchanged if they are contiguous channels of a wider map, else as a contiguous copy.
    """
    _, height, width, dim = x.shape
    strides = x.stride()
    stride = strides[2]
    if stride >= dim and strides == (height * width * stride, width * stride, stride, 1):
        return x
    # Flattened because PyTorch does not normalise the strides of axes of length 1.
    return x.contiguous().flatten().view(x.shape)


def compute_dtype_for(tensor: Tensor) -> torch.dtype:
    """The dtype that operators compute in: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def contiguous_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype).contiguous()``, with fewer calls of PyTorch if the tensor is that already."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty contiguous tensor of the same shape and dtype; ``new_empty`` takes twice as long to read the shape."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_NO_CHANGE = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Switch autocast off on the device of a tensor. The meta device has no autocast."""
    if not torch._C._is_any_autocast_enabled() or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return _NO_CHANGE
    return torch.autocast(tensor.device.type, enabled=False)


def keep_for_backward(*tensors: Tensor) -> bool:
    """Whether to keep what only the backward pass reads; while tracing always, so that all traces of a call agree."""
    return torch.jit.is_tracing() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
