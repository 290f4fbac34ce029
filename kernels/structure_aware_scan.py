"""The core of Spatial-Mamba, from tokens to tokens: selective scan, state fusion and read-out in one operator."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import require_float, require_same_device
from .precision import without_autocast
from .selective_scan import selective_scan_definition
from .state_fusion import check_branches, state_fusion_definition
from .taps import merge_taps, tap_offsets


def structure_aware_scan(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int] = (1, 3, 5),
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Scan the raster of tokens, fuse the states with their 2-D neighbours, read them out.

    With ``r, B, C`` the channels of ``projection`` and ``delta = softplus(step_weight r + step_bias)``, over the
    row-major raster ``h_t = exp(-delta_t exp(A_log)) h_(t-1) + delta_t B_t u_t`` from ``h = 0``; then
    ``y = C state_fusion(h) + D u``. Computed in float32 (float64 for float64 input), also under autocast.
    The native forms keep the step and the states out of memory and recompute them for the gradients.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, section 4.1, with one state per channel.

    Args:
        u: (batch, H, W, dim), the tokens.
        projection: (batch, H, W, R + 2), per token the low-rank step r (R channels), then B, then C.
        step_weight: (dim, R), R >= 1, expands r to the steps of all channels.
        step_bias: (dim,), added to the steps before the softplus.
        A_log: (dim,), logarithm of the rates of decay.
        D: (dim,), weight of the skip connection.
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K positive integers.
        out_dtype: dtype of the result, by default that of ``u``. With fusion kernels near 1 outputs are some 27
            times as large as states, which float16 may not hold.

    Returns:
        The outputs, (batch, H, W, dim).

    Raises:
        ValueError: if shapes or devices do not fit together, or the numbers of kernels, weights and dilations differ.
        TypeError: for a tensor that is not of a floating-point type.
    """
    _check_arguments(u, projection, step_weight, step_bias, A_log, D, kernels, alpha, dilations, out_dtype)
    compute_dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype if out_dtype is None else out_dtype

    with without_autocast(u):
        weights = [weight.to(compute_dtype) for weight in (step_weight, step_bias, A_log, D)]
        if backends.definition_serves(u):
            return structure_aware_scan_definition(
                u.to(compute_dtype), projection.to(compute_dtype), *weights, kernels, alpha, dilations
            ).to(out_dtype)

        io_dtype = u.dtype if projection.dtype == u.dtype else compute_dtype
        taps = merge_taps(kernels, alpha.to(compute_dtype), dilations)
        offsets = tap_offsets([kernel.shape[-1] for kernel in kernels], dilations)
        y, _ = torch.ops.spatial_mamba.structure_aware_scan(
            u.to(io_dtype).contiguous(),
            projection.to(io_dtype).contiguous(),
            *(weight.contiguous() for weight in weights),
            taps,
            offsets,
            out_dtype,
        )
        return y


def structure_aware_scan_definition(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int],
) -> Tensor:
    """The definition: the two operators one after the other; all tensors of one dtype, shapes as above."""
    height, width = u.shape[1:3]
    r, B, C = projection.split([step_weight.shape[1], 1, 1], dim=-1)
    raster = [x.flatten(1, 2).transpose(1, 2) for x in (u, F.linear(r, step_weight), B)]  # (batch, channels, L)
    states = selective_scan_definition(
        *raster[:2], -torch.exp(A_log)[:, None], raster[2], delta_bias=step_bias, delta_softplus=True
    )
    fused = state_fusion_definition(states.squeeze(2).unflatten(2, (height, width)), kernels, alpha, dilations)
    return C * fused.permute(0, 2, 3, 1) + D * u


def _check_arguments(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    kernels: Sequence[Tensor],
    alpha: Tensor,
    dilations: Sequence[int],
    out_dtype: torch.dtype | None,
) -> None:
    if u.ndim != 4 or 0 in u.shape[1:]:
        raise ValueError(f"u must be (batch, H, W, dim), none but batch zero, got {tuple(u.shape)}")
    dim = u.shape[-1]
    if step_weight.ndim != 2 or step_weight.shape[0] != dim or step_weight.shape[1] < 1:
        raise ValueError(f"step_weight must be (dim, R) with dim = {dim} and R >= 1, got {tuple(step_weight.shape)}")
    expected = (*u.shape[:3], step_weight.shape[1] + 2)
    if tuple(projection.shape) != expected:
        raise ValueError(
            f"projection must be (batch, H, W, R + 2) = {expected} to go with u of {tuple(u.shape)} and "
            f"step_weight of {tuple(step_weight.shape)}, got {tuple(projection.shape)}"
        )
    for name, tensor in (("step_bias", step_bias), ("A_log", A_log), ("D", D)):
        if tuple(tensor.shape) != (dim,):
            raise ValueError(f"{name} must be (dim,) = {(dim,)}, got {tuple(tensor.shape)}")
    check_branches(kernels, alpha, dilations, dim)
    tensors = dict(
        u=u, projection=projection, step_weight=step_weight, step_bias=step_bias, A_log=A_log, D=D, alpha=alpha,
        **{f"kernels[{k}]": kernel for k, kernel in enumerate(kernels)},
    )  # fmt: skip
    require_float(tensors)
    require_same_device(tensors)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a floating-point type, got {out_dtype}")
