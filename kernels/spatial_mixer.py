"""Everything between the two linear projections of a Spatial-Mamba block, as one operator."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise_conv import CONV_FLOPS, DEPTHWISE_CONV
from .depthwise_conv import reference as conv_reference
from .gated_norm import GATED_NORM
from .gated_norm import reference as norm_reference
from .registration import Operator
from .state_fusion import check_branches, check_dilations, merge_taps, tap_offsets
from .structure_aware_scan import CORE_TENSORS, STRUCTURE_AWARE_SCAN, flops_per_element
from .structure_aware_scan import reference as core_reference
from .tensors import at_token_stride, check_tensors


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
    ``xz``, as by separate operators; y is not. Autocast changes nothing. The native forms write the gradient of
    ``xz`` in one piece, and keep ``xz``, u, p, y and one state per row of tokens for it.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, section 4.1, with one state per channel.

    Args:
        xz: (batch, H, W, 2 dim), the tokens, then their gate.
        conv_weight: (dim, 1, 3, 3).
        conv_bias: (dim,).
        projection_weight: (R + 2, dim), projects u to the low-rank step (R channels), B and C.
        step_weight: (dim, R), R >= 1, expands the low-rank step to the steps of all channels.
        step_bias: (dim,), added to the steps before the softplus.
        A_log: (dim,), logarithm of the rates of decay.
        D: (dim,), weight of the skip connection.
        kernels: K tensors (dim, 1, k, k) of odd k; None if ``taps`` are given.
        alpha: (K,), the weight of each kernel; None if ``taps`` are given.
        norm_weight: (dim,).
        norm_bias: (dim,).
        dilations: K positive integers.
        eps: added to the variance.
        taps: (T, dim), what ``merge_taps`` makes of K kernels, in place of ``kernels`` and ``alpha``: saves merging
            weights that no longer change.
        kernel_sizes: of these K kernels; 3 each unless given.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``xz``.

    Raises:
        ValueError: if shapes or devices do not fit together, the numbers of kernels, weights and dilations differ, or
            not exactly one of ``kernels`` with ``alpha`` and ``taps`` is given.
        TypeError: for a tensor that is not of a floating-point type.
    """
    weights = dict(
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
    if kernels is not None:
        kernel_sizes = [kernel.shape[-1] for kernel in kernels]
    elif kernel_sizes is None:
        kernel_sizes = [3] * len(dilations)
    _check_arguments(xz, weights, kernels, alpha, taps, dilations, kernel_sizes)
    compute_dtype = torch.promote_types(xz.dtype, torch.float32)

    dtypes = {"projection_weight": xz.dtype}  # so that the product runs on half-precision units
    weights["conv_weight"] = conv_weight.flatten(1)
    weights = {name: weight.to(dtypes.get(name, compute_dtype)).contiguous() for name, weight in weights.items()}
    if taps is None:
        taps = merge_taps(kernels, alpha.to(compute_dtype), dilations)
    norm = (weights.pop("norm_weight"), weights.pop("norm_bias"))
    taps = taps.to(compute_dtype).contiguous()
    return SPATIAL_MIXER(xz, *weights.values(), taps, *norm, list(kernel_sizes), list(dilations), eps)


def reference(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference implementation: the outputs, then u, projection, y and the states before each row.

    conv_weight is (dim, 9), taps (T, dim). projection_weight is in the dtype of xz, all others in the compute dtype.
    """
    *core, norm_weight, norm_bias, sizes, dilations, eps = others
    x, gate = xz.chunk(2, dim=-1)
    u = conv_reference(x, conv_weight, conv_bias, "silu")
    projection = F.linear(u, projection_weight)
    y, row_states = core_reference(u, projection, *core, sizes, dilations, conv_weight.dtype)
    return norm_reference(y, gate, norm_weight, norm_bias, eps), u, projection, y, row_states


def _forward(
    _: ModuleType, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection_weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *core, norm_weight, norm_bias, sizes, dilations, eps = others
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    u = DEPTHWISE_CONV.run(x, conv_weight, conv_bias, "silu")
    projection = u @ projection_weight.t()
    y, row_states = STRUCTURE_AWARE_SCAN.run(u, projection, *core, sizes, dilations, conv_weight.dtype)
    return GATED_NORM.run(y, gate, norm_weight, norm_bias, eps), u, projection, y, row_states


def _backward(
    _: ModuleType,
    grad_out: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    *others: Any,
) -> Sequence[Tensor]:
    """Native backends write the halves of the first gradient where they belong."""
    *core, norm_weight, norm_bias, u, projection, y, row_states, sizes, dilations, eps = others
    x, gate = at_token_stride(xz).chunk(2, dim=-1)
    grad_xz = xz.new_empty(xz.shape)
    grad_x, grad_gate = grad_xz.chunk(2, dim=-1)

    norm = (y, gate, norm_weight, norm_bias, eps)
    grad_y, found, *norm_grads = GATED_NORM.run_backward(grad_out, *norm, grad_gate=grad_gate)
    if found is not grad_gate:
        grad_gate.copy_(found)
    core = (u, projection, *core, row_states, sizes, dilations, y.dtype)
    grad_u, grad_projection, *core_grads = STRUCTURE_AWARE_SCAN.run_backward(grad_y, *core)
    del grad_y
    flat = grad_projection.flatten(0, 2)
    grad_u.flatten(0, 2).addmm_(flat, projection_weight)
    grad_projection_weight = flat.t() @ u.flatten(0, 2)
    found, *conv_grads = DEPTHWISE_CONV.run_backward(grad_u, x, conv_weight, conv_bias, "silu", grad_x=grad_x)
    if found is not grad_x:
        grad_x.copy_(found)
    return grad_xz, *conv_grads, grad_projection_weight, *core_grads, *norm_grads


def _fake(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *image, channels = xz.shape
    dim, compute = channels // 2, conv_weight
    out, u = xz.new_empty(*image, dim), xz.new_empty(*image, dim)
    projection = xz.new_empty(*image, projection_weight.shape[0])
    return out, u, projection, compute.new_empty(*image, dim), compute.new_empty(*image[:2], dim)


def _flops(
    xz: Sequence[int],
    conv_weight: Sequence[int],
    conv_bias: Sequence[int],
    projection_weight: Sequence[int],
    step_weight: Sequence[int],
    *others: Any,
) -> int:
    taps = others[3]
    per_element = CONV_FLOPS + 2 * projection_weight[0] + flops_per_element(step_weight[1], taps[0])
    return xz[0] * xz[1] * xz[2] * conv_bias[0] * per_element


SPATIAL_MIXER = Operator(
    f"spatial_mixer(Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor projection_weight, {CORE_TENSORS}, "
    "Tensor norm_weight, Tensor norm_bias, int[] sizes, int[] dilations, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _forward,
    _fake,
    _backward,
    kept=4,
    flops=_flops,
    served_as="structure_aware_scan",
)


def _check_arguments(
    xz: Tensor,
    weights: dict[str, Tensor],
    kernels: Sequence[Tensor] | None,
    alpha: Tensor | None,
    taps: Tensor | None,
    dilations: Sequence[int],
    kernel_sizes: Sequence[int],
) -> None:
    if xz.ndim != 4 or 0 in xz.shape[1:] or xz.shape[-1] % 2:
        raise ValueError(f"xz must be (batch, H, W, 2 dim), none but batch zero, got {tuple(xz.shape)}")
    dim = xz.shape[-1] // 2
    step_weight = weights["step_weight"]
    if step_weight.ndim != 2 or step_weight.shape[0] != dim or step_weight.shape[1] < 1:
        raise ValueError(f"step_weight must be (dim, R) with dim = {dim} and R >= 1, got {tuple(step_weight.shape)}")
    layouts = {
        "conv_weight": ("(dim, 1, 3, 3)", (dim, 1, 3, 3)),
        "projection_weight": ("(R + 2, dim)", (step_weight.shape[1] + 2, dim)),
        "step_weight": ("(dim, R)", tuple(step_weight.shape)),
    }
    for name, weight in weights.items():
        layout, expected = layouts.get(name, ("(dim,)", (dim,)))
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} must be {layout} = {expected}, got {tuple(weight.shape)}")

    if (kernels is None) != (alpha is None) or (kernels is None) == (taps is None):
        given = [k for k, v in (("kernels", kernels), ("alpha", alpha), ("taps", taps)) if v is not None]
        raise ValueError(f"give either kernels and alpha, or taps; got {', '.join(given) or 'none of them'}")
    tensors = {"xz": xz, **weights}  # a union would break the graph of torch.compile before PyTorch 2.7
    if taps is None:
        check_branches(kernels, alpha, dilations, dim)
        tensors = {**tensors, "alpha": alpha, **{f"kernels[{k}]": kernel for k, kernel in enumerate(kernels)}}
    else:
        check_dilations(dilations)
        if len(kernel_sizes) != len(dilations) or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(
                f"kernel_sizes must be odd, one per dilation of {tuple(dilations)}, got {tuple(kernel_sizes)}"
            )
        expected = (len(tap_offsets(kernel_sizes, dilations)) // 2, dim)
        if tuple(taps.shape) != expected:
            raise ValueError(
                f"taps must be (T, dim) = {expected} for kernels of sizes {tuple(kernel_sizes)} with "
                f"dilations {tuple(dilations)}, got {tuple(taps.shape)}"
            )
        tensors = {**tensors, "taps": taps}
    check_tensors(tensors)
