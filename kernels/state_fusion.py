"""Structure-aware state fusion (SASF): a weighted sum of dilated depthwise convolutions of the states.

Kernels are merged into taps: one weight per distinct neighbour and channel. Three 3x3 kernels with dilations 1, 3, 5
have 27 weights but 25 taps, since they share the centre.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, layouts

LAYOUTS = layouts(h="batch, dim, H, W")
MOST_DILATION = 2**15 - 1  # no map is larger


def state_fusion(
    h: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int] = (1, 3, 5),
) -> Tensor:
    """Mix each state with its 2-D neighbours: ``sum_k alpha_k conv_k(h)``.

    Each ``conv_k`` is a depthwise convolution (cross-correlation) with stride 1 and replicate padding, which keeps the
    size. Computed in float32 (float64 for float64 input), also under autocast. Nothing is cached between calls.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, structure-aware state fusion.

    Args:
        h: (batch, dim, H, W), the states laid out on the image.
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K integers from 1 to ``MOST_DILATION``.

    Returns:
        The fused states, (batch, dim, H, W), in the dtype of ``h``.

    Raises:
        ValueError: if shapes or devices do not match, or the numbers of kernels, weights and dilations differ.
        TypeError: if a tensor is not of a real floating-point type.
    """
    sizes = check_tensors(LAYOUTS, dict(h=h))
    check_branches(kernels, alpha, dilations, sizes["dim"], h=h)
    taps = merge_taps(kernels, alpha.to(compute_dtype_for(h)), dilations)
    tokens = h.permute(0, 2, 3, 1).contiguous()  # (batch, H, W, dim)
    return STATE_FUSION(tokens, taps, kernel_sizes_of(kernels), list(dilations)).permute(0, 3, 1, 2)


def reference(h: Tensor, taps: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """The reference implementation, with states (batch, H, W, dim) and taps (T, dim) in the compute dtype."""
    states = h.to(taps.dtype)
    fused = torch.zeros_like(states)
    for kernel, dilation in zip(split_taps(taps, sizes, dilations), dilations, strict=True):
        dilation = min(dilation, h.shape[1] + h.shape[2])  # neighbours that are farther away are the same
        padded = repeat_edges(states, dilation * (kernel.shape[-1] // 2)).permute(0, 3, 1, 2)
        fused = fused + F.conv2d(padded, kernel, dilation=dilation, groups=h.shape[3]).permute(0, 2, 3, 1)
    return fused.to(h.dtype)


def repeat_edges(x: Tensor, reach: int) -> Tensor:
    """Replicate padding by ``reach`` on all sides of (batch, H, W, dim).

    PyTorch's own padding has a nondeterministic backward pass on GPUs, and Inductor (2.11) compiles it wrongly for
    channels-last inputs.
    """
    for axis in (1, 2):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([*[first] * reach, x, *[last] * reach], dim=axis)
    return x


def tap_offsets(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Distinct (row, column) offsets of square kernels with odd ``sizes``, sorted, as a flat list of 2 T integers."""
    if torch.compiler.is_compiling():  # compilers warn of caches
        return _flat_offsets(sizes, dilations)
    return _cached_offsets(tuple(sizes), tuple(dilations))


def _flat_offsets(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [coordinate for offset in _distinct(sizes, dilations) for coordinate in offset]


_cached_offsets = lru_cache(maxsize=32)(_flat_offsets)


def merge_taps(kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> Tensor:
    """Sum the weights ``alpha_k kernel_k`` per distinct offset. Differentiable.

    Args:
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K integers from 1 to ``MOST_DILATION``.

    Returns:
        (T, dim), in the order of ``tap_offsets`` and in the dtype of ``alpha``.
    """
    sizes = kernel_sizes_of(kernels)
    if backends.plain_eager(alpha, *kernels):
        plan = _merging(tuple(sizes), tuple(dilations), kernels[0].shape[0], alpha.dtype, alpha.device)
        return _Merge.apply(plan, alpha, *kernels)
    merged: dict[tuple[int, int], Tensor] = {}
    for kernel, weight, size, dilation in zip(kernels, alpha.unbind(), sizes, dilations, strict=True):
        columns = (weight * kernel.to(alpha.dtype).flatten(1)).unbind(1)  # k * k of (dim,)
        for offset, column in zip(_offsets(size, dilation), columns, strict=True):
            merged[offset] = merged[offset] + column if offset in merged else column
    return torch.stack([merged[offset] for offset in _distinct(sizes, dilations)])


class _Merging(NamedTuple):
    """Constants of `_Merge`, for N weights per channel in the K kernels."""

    sources: Tensor  # (K T,), per kernel and tap, the position of the weight in the kernels; N if there is none
    targets: Tensor  # (N,), the tap that each weight contributes to
    counts: list[int]  # weights per kernel
    zeros: Tensor  # (dim, 1)


@lru_cache(maxsize=32)
def _merging(
    sizes: tuple[int, ...], dilations: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device
) -> _Merging:
    """Cached, because copies to the GPU would synchronise with it in each call."""
    distinct = _distinct(sizes, dilations)
    branches = [_offsets(*pair) for pair in zip(sizes, dilations, strict=True)]
    counts = [len(offsets) for offsets in branches]
    sources = []
    for k, offsets in enumerate(branches):
        sources += [sum(counts[:k]) + offsets.index(x) if x in offsets else sum(counts) for x in distinct]
    targets = [distinct.index(offset) for offsets in branches for offset in offsets]
    with torch.inference_mode(False):
        source, target = (torch.tensor(index, device=device) for index in (sources, targets))
        return _Merging(source, target, counts, torch.zeros(dim, 1, dtype=dtype, device=device))


class _Merge(torch.autograd.Function):
    """`merge_taps` in few operations: for tensors this small, a launch takes longer than the operation."""

    @staticmethod
    def forward(ctx: Any, plan: _Merging, alpha: Tensor, *kernels: Tensor) -> Tensor:
        spread = _Merge.spread(plan, kernels)
        ctx.plan = plan
        ctx.save_for_backward(spread, alpha, *kernels)
        return (spread * alpha.view(-1, 1, 1)).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spread, alpha, *kernels = ctx.saved_tensors
        if torch.is_grad_enabled():
            spread = _Merge.spread(ctx.plan, kernels)
        parts = grad.t().index_select(1, ctx.plan.targets).split_with_sizes(ctx.plan.counts, dim=1)
        grads = ((part * weight).view_as(k) for part, weight, k in zip(parts, alpha.unbind(), kernels, strict=True))
        return None, (spread * grad).sum((1, 2)), *grads

    @staticmethod
    def spread(plan: _Merging, kernels: Sequence[Tensor]) -> Tensor:
        """The weights of each kernel at the places of the taps, (K, T, dim); 0 where it has none."""
        dim = len(plan.zeros)
        weights = torch.cat([*(kernel.reshape(dim, -1) for kernel in kernels), plan.zeros], dim=1)
        return weights.t().index_select(0, plan.sources).view(len(kernels), -1, dim)


def split_taps(taps: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """Undo `merge_taps` with weights of 1: turn taps (T, dim) into kernels (dim, 1, size, size). Differentiable.

    A tap that several kernels share goes to the first; the others are zero there.
    """
    remaining = dict(zip(_distinct(sizes, dilations), taps.unbind(), strict=True))
    zeros = torch.zeros_like(taps[0])
    kernels = []
    for size, dilation in zip(sizes, dilations, strict=True):
        columns = [remaining.pop(offset, zeros) for offset in _offsets(size, dilation)]
        kernels.append(torch.stack(columns, dim=1).unflatten(1, (1, size, size)))
    return kernels


def kernel_sizes_of(kernels: Sequence[Tensor]) -> list[int]:
    return [kernel.shape[-1] for kernel in kernels]


def _offsets(size: int, dilation: int) -> list[tuple[int, int]]:
    size = int(size)  # torch.jit.trace turns sizes into tensors, which cannot serve as keys
    steps = [dilation * (i - size // 2) for i in range(size)]
    return [(row, column) for row in steps for column in steps]


def _distinct(sizes: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    return sorted({offset for pair in zip(sizes, dilations, strict=True) for offset in _offsets(*pair)})


STATE_FUSION = Operator(
    "state_fusion(Tensor h, Tensor taps, int[] sizes, int[] dilations) -> Tensor",
    reference,
    fake=lambda h, *_: torch.empty_like(h),
    forward=lambda backend, h, taps, *branches: backend.state_fusion(h, taps, tap_offsets(*branches)),
    backward=lambda backend, grad_out, h, taps, *branches: backend.state_fusion_backward(
        grad_out, h, taps, tap_offsets(*branches)
    ),
    flops=lambda h, taps, *_: 2 * math.prod(h) * taps[0],
)


def check_branches(
    kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int], dim: int, **first: Tensor
) -> None:
    """Check that there are a (dim, 1, k, k) kernel, a weight and a dilation per branch, all on the device of ``first``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if alpha.ndim != 1 or not len(kernels) == len(dilations) == alpha.shape[0]:
        raise ValueError(
            f"each branch needs one kernel, one weight and one dilation, got {len(kernels)} kernels, "
            f"alpha of shape {tuple(alpha.shape)} and dilations {tuple(dilations)}"
        )
    if len(kernels) == 0:
        raise ValueError("kernels must hold at least one kernel")
    for kernel in kernels:
        size = kernel.shape[-1] if kernel.ndim else 0
        if tuple(kernel.shape) != (dim, 1, size, size) or size % 2 == 0:
            raise ValueError(
                f"fusion kernels must have shape (dim, 1, k, k) with dim = {dim} and odd k, got {tuple(kernel.shape)}"
            )
    check_dilations(dilations)
    check_tensors(layouts(), {**first, "alpha": alpha, **{f"kernels[{k}]": kernel for k, kernel in enumerate(kernels)}})


def check_dilations(dilations: Sequence[int], name: str = "dilations") -> None:
    """Raise ValueError unless all are integers from 1 to ``MOST_DILATION``."""
    if any(not isinstance(dilation, int) or not 1 <= dilation <= MOST_DILATION for dilation in dilations):
        raise ValueError(f"{name} must be integers from 1 to {MOST_DILATION}, got {tuple(dilations)}")
