"""The core of Spatial-Mamba, from tokens to tokens: selective scan, state fusion and read-out in one operator."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .selective_scan import SCAN_FLOPS
from .selective_scan import reference as scan_reference
from .state_fusion import check_branches, merge_taps, tap_offsets
from .state_fusion import reference as fusion_reference
from .tensors import check_tensors


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
    """Scan the tokens in row-major order, fuse the states with their 2-D neighbours, read them out.

    With ``r, B, C`` the channels of ``projection`` and ``delta = softplus(step_weight r + step_bias)``, over the
    tokens in row-major order ``h_t = exp(-delta_t exp(A_log)) h_(t-1) + delta_t B_t u_t`` from ``h = 0``; then
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
    io_dtype = u.dtype if projection.dtype == u.dtype else compute_dtype
    weights = (weight.to(compute_dtype).contiguous() for weight in (step_weight, step_bias, A_log, D))
    return STRUCTURE_AWARE_SCAN(
        u.to(io_dtype).contiguous(),
        projection.to(io_dtype).contiguous(),
        *weights,
        merge_taps(kernels, alpha.to(compute_dtype), dilations),
        [kernel.shape[-1] for kernel in kernels],
        list(dilations),
        u.dtype if out_dtype is None else out_dtype,
    )


def reference(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    sizes: Sequence[int],
    dilations: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The reference implementation: scan, fusion and read-out; all weights in the compute dtype, taps (T, dim).

    The second output, (batch, H, dim), are the states before the first token of each row.
    """
    u, projection = u.to(taps.dtype), projection.to(taps.dtype)
    r, B, C = projection.split([step_weight.shape[1], 1, 1], dim=-1)
    rows = [x.flatten(1, 2).transpose(1, 2) for x in (u, F.linear(r, step_weight), B)]  # (batch, channels, L)
    A = -torch.exp(A_log)[:, None]
    states, _ = scan_reference(*rows[:2], A, rows[2][:, None], None, None, None, step_bias, delta_softplus=True)
    h = states.squeeze(2).unflatten(2, u.shape[1:3]).permute(0, 2, 3, 1)  # (batch, H, W, dim)
    y = C * fusion_reference(h, taps, sizes, dilations) + D * u
    return y.to(out_dtype), F.pad(h[:, :-1, -1], (0, 0, 1, 0))


def _forward(backend: ModuleType, *arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, sizes, dilations, out_dtype = arguments
    return backend.structure_aware_scan(*tensors, tap_offsets(sizes, dilations), out_dtype)


def _backward(backend: ModuleType, *arguments: Any) -> Sequence[Tensor]:
    *tensors, sizes, dilations, _ = arguments
    return backend.structure_aware_scan_backward(*tensors, tap_offsets(sizes, dilations))


def _fake(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    taps, out_dtype = others[5], others[-1]
    return torch.empty_like(u, dtype=out_dtype), taps.new_empty(u.shape[0], u.shape[1], u.shape[3])


def flops_per_element(rank: int, taps: int) -> int:
    """FLOPs per token and channel, for a low-rank step of ``rank`` channels."""
    return 2 * rank + SCAN_FLOPS + 2 * taps


def _flops(u: Sequence[int], projection: Sequence[int], step_weight: Sequence[int], *others: Any) -> int:
    return u[0] * u[1] * u[2] * u[3] * flops_per_element(step_weight[1], others[3][0])


CORE_TENSORS = "Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, Tensor taps"
# The backward pass recomputes each row of tokens from the state before it.
STRUCTURE_AWARE_SCAN = Operator(
    f"structure_aware_scan(Tensor u, Tensor projection, {CORE_TENSORS}, int[] sizes, int[] dilations, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    reference,
    _forward,
    _fake,
    _backward,
    kept=1,
    flops=_flops,
)


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
    check_tensors(tensors)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a floating-point type, got {out_dtype}")
