"""Everything between the two linear projections of a Spatial-Mamba block, as one operator."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import CONV_FLOPS, DEPTHWISE_CONV
from .depthwise_conv import reference as conv_reference
from .gated_norm import GATED_NORM
from .gated_norm import reference as norm_reference
from .registration import Operator
from .state_fusion import check_branches, check_dilations, kernel_sizes_of, merge_taps, tap_offsets
from .structure_aware_scan import CORE_TENSORS, STRUCTURE_AWARE_SCAN, flops_per_element
from .structure_aware_scan import reference as core_reference
from .tensors import (
    at_token_stride,
    check_tensors,
    compute_dtype_for,
    contiguous_as,
    contiguous_like,
    keep_for_backward,
    layouts,
)

LAYOUTS = layouts(
    xz="batch, H, W, 2 dim",
    conv_weight="dim, 1, 3, 3",
    conv_bias="dim",
    step_weight="dim, R",
    projection_weight="R + 2, dim",
    step_bias="dim",
    A_log="dim",
    D="dim",
    norm_weight="dim",
    norm_bias="dim",
    taps="T, dim",
)


def spatial_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    kernels: Sequence[Tensor] | None,
    alpha: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dilations: Sequence[int] = (1, 3, 5),
    eps: float = 1e-5,
    *,
    taps: Tensor | None = None,
    kernel_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Convolve, project, scan, fuse and read out, normalise and gate.

    With x and z the halves of ``xz``: ``u = silu(depthwise_conv(x))``, ``p = projection_weight u``,
    ``y = structure_aware_scan(u, p, ...)``, and the result is ``gated_norm(y, z)``. u and p are rounded to the dtype of
    ``xz``, as separate operators would do; y is not. Autocast has no effect. For the backward pass, native backends
    keep ``xz``, y and one state per row of tokens, and compute u and p again.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, section 4.1, with one state per channel.

    Args:
        xz: (batch, H, W, 2 dim), the tokens and their gate, concatenated.
        conv_weight: (dim, 1, 3, 3).
        conv_bias: (dim,).
        projection_weight: (R + 2, dim), projects u to the low-rank delta (R channels), B and C.
        step_weight: (dim, R), R >= 1, expands the low-rank delta to all channels.
        step_bias: (dim,), added before the softplus.
        A_log: (dim,), the logarithm of -A.
        D: (dim,), weight of the skip connection.
        kernels: K tensors (dim, 1, k, k) of odd k; None if ``taps`` are given.
        alpha: (K,), the weight of each kernel; None if ``taps`` are given.
        norm_weight: (dim,).
        norm_bias: (dim,).
        dilations: K integers, as in `state_fusion`.
        eps: added to the variance.
        taps: (T, dim), from ``merge_taps``, instead of ``kernels`` and ``alpha``: saves merging constant weights.
        kernel_sizes: the K sizes of the kernels in ``taps``, 3 each by default.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``xz``.

    Raises:
        ValueError: if shapes or devices do not match, if the numbers of kernels, weights and dilations differ, or
            unless either ``kernels`` with ``alpha`` or ``taps`` are given.
        TypeError: if a tensor is not of a real floating-point type.
    """
    tensors = dict(
        xz=xz,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        projection_weight=projection_weight,
        step_weight=step_weight,
        step_bias=step_bias,
        A_log=A_log,
        D=D,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    axes = check_tensors(LAYOUTS, tensors)
    compute_dtype = compute_dtype_for(xz)
    if kernels is not None and alpha is not None and taps is None and kernel_sizes is None:
        check_branches(kernels, alpha, dilations, axes["dim"], xz=xz)
        sizes = kernel_sizes_of(kernels)
        taps = merge_taps(kernels, alpha.to(compute_dtype), dilations)
    elif taps is not None and kernels is None and alpha is None:
        sizes = [3] * len(dilations) if kernel_sizes is None else list(kernel_sizes)
        check_dilations(dilations)
        if len(sizes) != len(dilations) or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_sizes must be odd, one per dilation of {tuple(dilations)}, got {tuple(sizes)}")
        check_tensors(LAYOUTS, dict(xz=xz, taps=taps), T=len(tap_offsets(sizes, dilations)) // 2)
    else:
        options = dict(kernels=kernels, alpha=alpha, taps=taps, kernel_sizes=kernel_sizes)
        given = ", ".join(name for name, value in options.items() if value is not None) or "none of them"
        raise ValueError(f"give either kernels and alpha, or taps, which can have kernel_sizes; got {given}")

    converted = [
        contiguous_as(conv_weight, compute_dtype),
        contiguous_as(conv_bias, compute_dtype),
        contiguous_as(projection_weight, xz.dtype),  # so that the product runs on half-precision units
        *(contiguous_as(x, compute_dtype) for x in (step_weight, step_bias, A_log, D, taps, norm_weight, norm_bias)),
    ]
    return SPATIAL_MIXER(xz, *converted, sizes, list(dilations), eps, keep_for_backward(xz, *converted))


def reference(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection_weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """The reference implementation: the outputs, then y and the state before each row, both empty unless ``keep``.

    conv_weight has shape (dim, 1, 3, 3) or (dim, 9), taps (T, dim). projection_weight has the dtype of xz, all others
    the compute dtype.
    """
    *core, norm_weight, norm_bias, sizes, dilations, eps, keep = others
    step_weight, step_bias, A_log, D, taps = core
    x, gate = xz.chunk(2, dim=-1)
    u = conv_reference(x, conv_weight, conv_bias, "silu")
    projection = F.linear(u, projection_weight)
    y, row_states = core_reference(
        u, projection, step_weight, step_bias, A_log, D, taps, sizes, dilations, conv_weight.dtype
    )
    return norm_reference(y, gate, norm_weight, norm_bias, eps), *_kept(y, row_states, keep)


def _kept(y: Tensor, row_states: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return (y, row_states) if keep else (y.new_empty(0), row_states.new_empty(0))


def _forward(
    backend: ModuleType, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection_weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *core, norm_weight, norm_bias, sizes, dilations, eps, keep = others
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    if hasattr(backend, "spatial_mixer"):
        weights = (conv_weight, conv_bias, projection_weight, *core, norm_weight, norm_bias)
        return backend.spatial_mixer(x, gate, *weights, tap_offsets(sizes, dilations), eps, keep)
    u = DEPTHWISE_CONV.run(x, conv_weight, conv_bias, "silu")
    projection = F.linear(u, projection_weight)
    y, row_states = STRUCTURE_AWARE_SCAN.run(u, projection, *core, sizes, dilations, conv_weight.dtype)
    return GATED_NORM.run(y, gate, norm_weight, norm_bias, eps), *_kept(y, row_states, keep)


def _backward(
    backend: ModuleType, grad_out: Tensor, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """Compute u and p again, and let native backends write both halves of the gradient of ``xz`` in place."""
    projection_weight, *core, norm_weight, norm_bias, y, row_states, sizes, dilations, eps, _ = others
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    weights = (conv_weight, conv_bias, projection_weight, *core, norm_weight, norm_bias)
    if not len(y):  # not kept, as when the operator was traced or exported without gradients
        _, y, row_states = _forward(backend, xz, *weights, sizes, dilations, eps, True)
    grad_xz = contiguous_like(xz)
    grad_x, grad_gate = grad_xz.chunk(2, dim=-1)
    if hasattr(backend, "spatial_mixer_backward"):
        offsets = tap_offsets(sizes, dilations)
        return grad_xz, *backend.spatial_mixer_backward(
            grad_out, x, gate, *weights, y, row_states, offsets, eps, grad_x, grad_gate
        )

    norm = (y, gate, norm_weight, norm_bias, eps)
    grad_y, found, *norm_grads = GATED_NORM.run_backward(grad_out, *norm, grad_gate=grad_gate)
    if found is not grad_gate:
        grad_gate.copy_(found)
    u = DEPTHWISE_CONV.run(x, conv_weight, conv_bias, "silu")
    projection = F.linear(u, projection_weight)
    inputs = (u, projection, *core, row_states, sizes, dilations, y.dtype)
    grad_u, grad_projection, *core_grads = STRUCTURE_AWARE_SCAN.run_backward(grad_y, *inputs)
    del grad_y
    flat = grad_projection.view(-1, grad_projection.shape[3])
    grad_u.view(-1, u.shape[3]).addmm_(flat, projection_weight)
    grad_projection_weight = flat.t() @ u.view(-1, u.shape[3])
    found, *conv_grads = DEPTHWISE_CONV.run_backward(grad_u, x, conv_weight, conv_bias, "silu", grad_x=grad_x)
    if found is not grad_x:
        grad_x.copy_(found)
    return grad_xz, *conv_grads, grad_projection_weight, *core_grads, *norm_grads


def _fake(xz: Tensor, conv_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *image, channels = xz.shape
    dim, compute = channels // 2, conv_weight
    y, row_states = compute.new_empty(*image, dim), compute.new_empty(*image[:2], dim)
    return xz.new_empty(*image, dim), *_kept(y, row_states, others[-1])


def _flops(xz: Sequence[int], *weights: Any) -> int:
    conv_weight, _, projection_weight, step_weight, _, _, _, taps, *_ = weights
    per_element = CONV_FLOPS + 2 * projection_weight[0] + flops_per_element(step_weight[1], taps[0])
    return math.prod(xz[:3]) * conv_weight[0] * per_element


SPATIAL_MIXER = Operator(
    f"spatial_mixer(Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor projection_weight, {CORE_TENSORS}, "
    "Tensor norm_weight, Tensor norm_bias, int[] sizes, int[] dilations, float eps, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    _forward,
    _backward,
    kept=2,
    served_as="structure_aware_scan",
    flops=_flops,
)
