"""The core of Spatial-Mamba, from tokens to tokens: selective scan, state fusion and read-out in one operator."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .selective_scan import SCAN_FLOPS
from .selective_scan import reference as scan_reference
from .state_fusion import check_branches, kernel_sizes_of, merge_taps, tap_offsets
from .state_fusion import reference as fusion_reference
from .tensors import check_tensors, compute_dtype_for, contiguous_as, layouts

LAYOUTS = layouts(
    u="batch, H, W, dim",
    step_weight="dim, R",
    projection="batch, H, W, R + 2",
    step_bias="dim",
    A_log="dim",
    D="dim",
)


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
    Native backends store neither the deltas nor the states; they recompute them for the gradients.
    Source: Xiao et al., "Spatial-Mamba", arXiv 2410.15091, section 4.1, with one state per channel.

    Args:
        u: (batch, H, W, dim), the tokens.
        projection: (batch, H, W, R + 2), per token the low-rank delta r (R channels), then B, then C.
        step_weight: (dim, R), R >= 1, expands r to all channels.
        step_bias: (dim,), added before the softplus.
        A_log: (dim,), the logarithm of -A.
        D: (dim,), weight of the skip connection.
        kernels: K tensors (dim, 1, k, k) of odd k.
        alpha: (K,), the weight of each kernel.
        dilations: K integers, as in `state_fusion`.
        out_dtype: dtype of the result, by default that of ``u``. With fusion kernels near 1, outputs are about 27
            times as large as states and may exceed the range of float16.

    Returns:
        The outputs, (batch, H, W, dim).

    Raises:
        ValueError: if shapes or devices do not match, or the numbers of kernels, weights and dilations differ.
        TypeError: if a tensor, or ``out_dtype``, is not of a real floating-point type.
    """
    tensors = dict(u=u, step_weight=step_weight, projection=projection, step_bias=step_bias, A_log=A_log, D=D)
    axes = check_tensors(LAYOUTS, tensors)
    check_branches(kernels, alpha, dilations, axes["dim"], u=u)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a floating-point type, got {out_dtype}")
    compute_dtype = compute_dtype_for(u)
    io_dtype = u.dtype if projection.dtype == u.dtype else compute_dtype
    weights = (contiguous_as(weight, compute_dtype) for weight in (step_weight, step_bias, A_log, D))
    return STRUCTURE_AWARE_SCAN(
        contiguous_as(u, io_dtype),
        contiguous_as(projection, io_dtype),
        *weights,
        merge_taps(kernels, alpha.to(compute_dtype), dilations),
        kernel_sizes_of(kernels),
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
    """The reference implementation, with taps (T, dim) and all weights in the compute dtype.

    The second output, (batch, H, dim), holds the state before the first token of each row.
    """
    u, projection = u.to(taps.dtype), projection.to(taps.dtype)
    r, B, C = projection.split([step_weight.shape[1], 1, 1], dim=-1)
    tokens, dt, B = (x.flatten(1, 2).transpose(1, 2) for x in (u, F.linear(r, step_weight), B))  # (batch, channels, L)
    A = -torch.exp(A_log)[:, None]
    states, _ = scan_reference(tokens, dt, A, B[:, None], None, None, None, step_bias, delta_softplus=True)
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
    """FLOPs per token and channel, for a low-rank delta of ``rank`` channels."""
    return 2 * rank + SCAN_FLOPS + 2 * taps


CORE_TENSORS = "Tensor step_weight, Tensor step_bias, Tensor A_log, Tensor D, Tensor taps"
# The backward pass recomputes each row of tokens from the state before it.
STRUCTURE_AWARE_SCAN = Operator(
    f"structure_aware_scan(Tensor u, Tensor projection, {CORE_TENSORS}, int[] sizes, int[] dilations, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    reference,
    _fake,
    _forward,
    _backward,
    kept=1,
    flops=lambda u, _, step_weight, *others: math.prod(u) * flops_per_element(step_weight[1], others[3][0]),
)
