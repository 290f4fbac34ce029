"""The distinct taps of several dilated kernels over one map, and the sums of the weights that fall on each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tap_offsets(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Distinct (row, column) offsets of square kernels of odd ``sizes``, sorted, as one flat list of 2 T integers.

    Sizes 3, 3, 3 with dilations 1, 3, 5 read 25 neighbours: 27 weights, of which three fall on the centre.
    """
    return [coordinate for offset in _distinct(sizes, dilations) for coordinate in offset]


def merge_taps(kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> Tensor:
    """Sum the weights ``alpha_k kernel_k`` per distinct offset, differentiably.

    Args:
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K positive integers.

    Returns:
        (T, dim), in the order of ``tap_offsets`` and in the dtype of ``alpha``.
    """
    sizes = [kernel.shape[-1] for kernel in kernels]
    merged: dict[tuple[int, int], Tensor] = {}
    for kernel, weight, size, dilation in zip(kernels, alpha.unbind(), sizes, dilations, strict=True):
        columns = (weight * kernel.to(alpha.dtype).flatten(1)).unbind(1)  # k * k of (dim,)
        for offset, column in zip(_offsets(size, dilation), columns, strict=True):
            merged[offset] = merged[offset] + column if offset in merged else column
    return torch.stack([merged[offset] for offset in _distinct(sizes, dilations)])


def split_taps(taps: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """Kernels (dim, 1, size, size) that ``merge_taps`` makes ``taps``, (T, dim), of with weights of 1, differentiably.

    A tap that several kernels share goes to the first; the others are zero there.
    """
    left = dict(zip(_distinct(sizes, dilations), taps.unbind(), strict=True))
    none = torch.zeros_like(taps[0])
    return [
        torch.stack([left.pop(offset, none) for offset in _offsets(size, dilation)], dim=1).unflatten(
            1, (1, size, size)
        )
        for size, dilation in zip(sizes, dilations, strict=True)
    ]


def _offsets(size: int, dilation: int) -> list[tuple[int, int]]:
    size = int(size)  # torch.jit.trace makes sizes tensors, which are no keys
    steps = [dilation * (i - size // 2) for i in range(size)]
    return [(row, column) for row in steps for column in steps]


def _distinct(sizes: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    return sorted({offset for pair in zip(sizes, dilations, strict=True) for offset in _offsets(*pair)})
