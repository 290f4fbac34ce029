"""Structure-aware state fusion (SASF): dilated depthwise convolutions of the states, summed up.

Kernels that share neighbours are merged into taps: one weight per distinct neighbour and channel. Sizes 3, 3, 3 with
dilations 1, 3, 5 read 25 neighbours: 27 weights, of which three fall on the centre.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import check_tensors


def state_fusion(
    h: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int] = (1, 3, 5),
) -> Tensor:
    """Mix each state with its 2-D neighbours: ``sum_k alpha_k conv_k(h)``.

    Each ``conv_k`` is a depthwise convolution (cross-correlation) of stride 1 whose borders repeat the edge
    states, so that the size is kept. Computed in float32 (float64 for float64 input), also under autocast.
    Nothing derived from the weights is kept between calls.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, structure-aware state fusion.

    Args:
        h: (batch, dim, H, W), the states laid out on the image.
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K positive integers.

    Returns:
        The fused states, (batch, dim, H, W), in the dtype of ``h``.

    Raises:
        ValueError: if shapes or devices do not fit, or the numbers of kernels, weights and dilations differ.
        TypeError: for a tensor that is not of a real floating-point type.
    """
    _check_arguments(h, kernels, alpha, dilations)
    taps = merge_taps(kernels, alpha.to(torch.promote_types(h.dtype, torch.float32)), dilations)
    tokens = h.permute(0, 2, 3, 1).contiguous()  # (batch, H, W, dim)
    sizes = [kernel.shape[-1] for kernel in kernels]
    return STATE_FUSION(tokens, taps, sizes, list(dilations)).permute(0, 3, 1, 2)


def reference(h: Tensor, taps: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """The reference implementation: states (batch, H, W, dim), taps (T, dim) in the compute dtype."""
    states = h.to(taps.dtype)
    fused = torch.zeros_like(states)
    for kernel, dilation in zip(split_taps(taps, sizes, dilations), dilations, strict=True):
        padded = repeat_edges(states, dilation * (kernel.shape[-1] // 2)).permute(0, 3, 1, 2)
        fused = fused + F.conv2d(padded, kernel, dilation=dilation, groups=h.shape[3]).permute(0, 2, 3, 1)
    return fused.to(h.dtype)


def repeat_edges(x: Tensor, reach: int) -> Tensor:
    """Replicate padding by ``reach`` on all sides of (batch, H, W, dim).

    PyTorch's own is neither deterministic in its backward pass on GPUs, nor right under Inductor for
    channels-last inputs (2.11).
    """
    for axis in (1, 2):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([*[first] * reach, x, *[last] * reach], dim=axis)
    return x


def tap_offsets(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Distinct (row, column) offsets of square kernels of odd ``sizes``, sorted, as one flat list of 2 T integers."""
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
    """Kernels (dim, 1, size, size) that ``merge_taps`` with weights of 1 turns into ``taps``, (T, dim), differentiably.

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
    size = int(size)  # torch.jit.trace turns sizes into tensors, which cannot serve as keys
    steps = [dilation * (i - size // 2) for i in range(size)]
    return [(row, column) for row in steps for column in steps]


def _distinct(sizes: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    return sorted({offset for pair in zip(sizes, dilations, strict=True) for offset in _offsets(*pair)})


def _forward(backend: ModuleType, h: Tensor, taps: Tensor, *branches: Sequence[int]) -> Tensor:
    return backend.state_fusion(h, taps, tap_offsets(*branches))


def _backward(
    backend: ModuleType, grad_out: Tensor, h: Tensor, taps: Tensor, *branches: Sequence[int]
) -> Sequence[Tensor]:
    return backend.state_fusion_backward(grad_out, h, taps, tap_offsets(*branches))


def _flops(h: Sequence[int], taps: Sequence[int], *_: Sequence[int]) -> int:
    return 2 * h[0] * h[1] * h[2] * taps[0] * taps[1]


STATE_FUSION = Operator(
    "state_fusion(Tensor h, Tensor taps, int[] sizes, int[] dilations) -> Tensor",
    reference,
    _forward,
    fake=lambda h, *_: torch.empty_like(h),
    backward=_backward,
    flops=_flops,
)


def _check_arguments(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> None:
    if h.ndim != 4 or 0 in h.shape[1:]:
        raise ValueError(f"h must be (batch, dim, H, W), none but batch zero, got {tuple(h.shape)}")
    check_branches(kernels, alpha, dilations, h.shape[1])
    check_tensors({"h": h, "alpha": alpha, **{f"kernels[{k}]": kernel for k, kernel in enumerate(kernels)}})


def check_branches(kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int], dim: int) -> None:
    """Raise ValueError unless there is one (dim, 1, k, k) kernel, one weight and one dilation per branch."""
    if alpha.ndim != 1 or not len(kernels) == len(dilations) == alpha.shape[0]:
        raise ValueError(
            f"one kernel, one weight and one dilation per branch are needed, got {len(kernels)} kernels, "
            f"alpha of {tuple(alpha.shape)} and dilations {tuple(dilations)}"
        )
    if len(kernels) == 0:
        raise ValueError("kernels must hold at least one kernel")
    for kernel in kernels:
        size = kernel.shape[-1]
        if tuple(kernel.shape) != (dim, 1, size, size) or size % 2 == 0:
            raise ValueError(
                f"a fusion kernel must be (dim, 1, k, k) with dim = {dim} and odd k, got {tuple(kernel.shape)}"
            )
    check_dilations(dilations)


def check_dilations(dilations: Sequence[int]) -> None:
    """Raise ValueError unless all are positive integers."""
    if any(not isinstance(dilation, int) or dilation < 1 for dilation in dilations):
        raise ValueError(f"dilations must be positive integers, got {tuple(dilations)}")
