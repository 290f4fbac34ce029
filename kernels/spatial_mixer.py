"""All of a Spatial-Mamba block between its two linear projections, in one operator."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import require_float, require_same_device
from .depthwise_conv import depthwise_conv_definition
from .gated_norm import gated_norm_definition
from .precision import without_autocast
from .state_fusion import check_branches, check_dilations
from .structure_aware_scan import structure_aware_scan_definition
from .taps import merge_taps, split_taps, tap_offsets


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
        projection_weight: (R + 2, dim), makes the low-rank step (R channels), B and C out of u.
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

    with without_autocast(xz):
        dtypes = {"projection_weight": xz.dtype}  # of a matrix product, which half-precision units are for
        weights = {name: weight.to(dtypes.get(name, compute_dtype)) for name, weight in weights.items()}
        if backends.definition_serves(xz):
            if taps is not None:
                kernels, alpha = split_taps(taps, kernel_sizes, dilations), taps.new_ones(len(dilations))
            return _definition(xz, **weights, kernels=kernels, alpha=alpha, dilations=dilations, eps=eps)

        if taps is None:
            taps = merge_taps(kernels, alpha.to(compute_dtype), dilations)
        weights["conv_weight"] = weights["conv_weight"].flatten(1)
        out, *_ = torch.ops.spatial_mamba.spatial_mixer(
            xz,
            **{name: weight.contiguous() for name, weight in weights.items()},
            taps=taps.to(compute_dtype).contiguous(),
            offsets=tap_offsets(kernel_sizes, dilations),
            eps=eps,
        )
        return out


def _definition(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection_weight: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int],
    eps: float,
) -> Tensor:
    """The definition: the operators one after the other; weights in the dtypes that they are computed with."""
    compute_dtype = step_weight.dtype
    x, gate = xz.chunk(2, dim=-1)
    u = depthwise_conv_definition(x, conv_weight, conv_bias, "silu")
    projection = F.linear(u, projection_weight)
    core = (u.to(compute_dtype), projection.to(compute_dtype), step_weight, step_bias, A_log, D)
    y = structure_aware_scan_definition(*core, kernels, alpha, dilations)
    return gated_norm_definition(y, gate, norm_weight, norm_bias, eps)


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
    require_float(tensors)
    require_same_device(tensors)
