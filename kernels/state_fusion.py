"""Structure-aware state fusion (SASF): the public function, and its definition in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import require_float, require_same_device
from .precision import without_autocast
from .taps import merge_taps, tap_offsets


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
    compute_dtype = torch.promote_types(h.dtype, torch.float32)

    with without_autocast(h):
        if backends.definition_serves(h):
            return state_fusion_definition(h, kernels, alpha, dilations)

        taps = merge_taps(kernels, alpha.to(compute_dtype), dilations)
        offsets = tap_offsets([kernel.shape[-1] for kernel in kernels], dilations)
        tokens = h.permute(0, 2, 3, 1).contiguous()  # (batch, H, W, dim)
        return torch.ops.spatial_mamba.state_fusion(tokens, taps, offsets).permute(0, 3, 1, 2)


def state_fusion_definition(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> Tensor:
    """The definition; arguments and result are those of ``state_fusion``, which checks them."""
    compute_dtype = torch.promote_types(h.dtype, torch.float32)
    states = h.to(compute_dtype)
    fused = torch.zeros_like(states)
    for kernel, weight, dilation in zip(kernels, alpha.to(compute_dtype), dilations, strict=True):
        reach = dilation * (kernel.shape[-1] // 2)
        scaled = weight * kernel.to(compute_dtype)
        fused = fused + F.conv2d(_repeat_edges(states, reach), scaled, dilation=dilation, groups=h.shape[1])
    return fused.to(h.dtype)


def _repeat_edges(h: Tensor, reach: int) -> Tensor:
    """Replicate padding by ``reach`` on all sides, channels-last in memory.

    PyTorch's own is neither deterministic in its backward pass on GPUs, nor right under Inductor for
    channels-last inputs (2.11).
    """
    x = h.permute(0, 2, 3, 1)  # (batch, H, W, dim)
    for axis in (1, 2):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([*[first] * reach, x, *[last] * reach], dim=axis)
    return x.permute(0, 3, 1, 2)


def _check_arguments(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> None:
    if h.ndim != 4 or 0 in h.shape[1:]:
        raise ValueError(f"h must be (batch, dim, H, W), none but batch zero, got {tuple(h.shape)}")
    check_branches(kernels, alpha, dilations, h.shape[1])
    tensors = {"h": h, "alpha": alpha, **{f"kernels[{k}]": kernel for k, kernel in enumerate(kernels)}}
    require_float(tensors)
    require_same_device(tensors)


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
