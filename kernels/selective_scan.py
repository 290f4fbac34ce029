"""The selective scan (S6)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrence import linear_recurrence
from .registration import Operator
from .tensors import check_tensors, compute_dtype_for, contiguous_as, layouts

# Per element and state, as in the published tables: the exponential and its argument, two products and a sum for the
# recurrence, a product and a sum for the read-out.
SCAN_FLOPS = 7
LAYOUTS = layouts(u="batch, dim, L", delta="batch, dim, L", A="dim, N", D="dim", z="batch, dim, L", delta_bias="dim")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | Any:
    """Run ``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y_t = C_t h_t + D u_t`` over L tokens.

    Signature and layouts are those of mamba_ssm's ``selective_scan_fn``. A must be real.
    The recurrence is computed in float32 (float64 for float64 input), also under autocast.
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2; Spatial-Mamba reads the states (``C=None``).

    Args:
        u: (batch, dim, L), the tokens.
        delta: (batch, dim, L), before ``delta_bias`` and softplus.
        A: (dim, N); negative values let the states decay.
        B: (dim, N), (batch, N, L) or (batch, groups, N, L); groups must divide dim.
        C: like B; ``None`` returns the states instead of the outputs.
        D: (dim,), weight of the skip connection.
        z: (batch, dim, L); the output is multiplied by ``silu(z)``.
        delta_bias: (dim,), added to ``delta``.
        delta_softplus: apply softplus to the biased ``delta``.
        return_last_state: also return ``h_L``.

    Returns:
        Outputs (batch, dim, L) in the dtype of ``u``; or, for ``C=None``, states (batch, dim, N, L) in the
        dtype of the recurrence. With ``return_last_state``, a pair of these and the last state (batch, dim, N).

    Raises:
        ValueError: if shapes or devices do not match, or if D or z is given without C.
        TypeError: if a tensor is not of a real floating-point type.
    """
    if C is None and (D is not None or z is not None):
        raise ValueError("D and z act on the outputs: pass C too, or omit D and z to get the states")
    axes = check_tensors(LAYOUTS, dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias))
    _check_matrix("B", B, **axes)
    if C is not None:
        _check_matrix("C", C, **axes)
    compute_dtype = compute_dtype_for(u)
    tokens = [u, delta, *_grouped(B, C, u), z]
    same = all(x is None or x.dtype == u.dtype for x in tokens)
    u_, delta_, B_, C_, z_ = (_as(x, u.dtype if same else compute_dtype) for x in tokens)
    A_, D_, bias_ = (_as(x, compute_dtype) for x in (A, D, delta_bias))
    out, last_state = SELECTIVE_SCAN(u_, delta_, A_, B_, C_, D_, z_, bias_, delta_softplus)
    out = out if C is None else out.to(u.dtype)
    return (out, last_state) if return_last_state else out


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The reference implementation: outputs (batch, dim, L), or states (batch, dim, N, L) without C; and last states.

    B and C have shape (batch, groups, N, L); A, D and delta_bias have the compute dtype.
    """
    tokens, dt = u.to(A.dtype), delta.to(A.dtype)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    decays = torch.exp(dt[:, :, None, 1:] * A[:, :, None])  # (batch, dim, N, L - 1)
    inputs = (dt * tokens)[:, :, None] * _per_channel(B, u.shape[1]).to(A.dtype)  # (batch, dim, N, L)
    states = linear_recurrence(decays, inputs)
    if C is None:
        return states, states[..., -1]
    out = (states * _per_channel(C, u.shape[1]).to(A.dtype)).sum(dim=2)  # (batch, dim, L)
    if D is not None:
        out = out + D[:, None] * tokens
    if z is not None:
        out = out * F.silu(z.to(A.dtype))
    return out.to(u.dtype), states[..., -1]


def _fake(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(u) if C is not None else A.new_empty(*u.shape[:2], A.shape[1], u.shape[2])
    return out, A.new_empty(*u.shape[:2], A.shape[1])


SELECTIVE_SCAN = Operator(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
    reference,
    _fake,
    flops=lambda u, _, A, *others: SCAN_FLOPS * math.prod(u) * A[1],
)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else contiguous_as(x, dtype)


def _grouped(B: Tensor, C: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bring B and C from any accepted layout to (batch, groups, N, L), with the same number of groups."""
    batch, dim, length = u.shape

    def unfold(matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:  # (dim, N), the same for every token: each channel is a group
            return matrix[None, :, :, None].expand(batch, dim, -1, length)
        return matrix[:, None] if matrix.ndim == 3 else matrix

    B = unfold(B)
    if C is None:
        return B, None
    C = unfold(C)
    groups = math.lcm(B.shape[1], C.shape[1])  # divides dim, as both do
    B, C = (x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], dim=1) for x in (B, C))
    return B, C


def _per_channel(matrix: Tensor, dim: int) -> Tensor:
    """Repeat (batch, groups, N, L) so that it broadcasts against (batch, dim, N, L)."""
    groups = matrix.shape[1]
    return matrix if groups == 1 else matrix.repeat_interleave(dim // groups, dim=1)


def _check_matrix(name: str, matrix: Tensor, batch: int, dim: int, L: int, N: int) -> None:
    shape = tuple(matrix.shape)
    groups = shape[1] if len(shape) == 4 else 1
    if shape not in ((dim, N), (batch, N, L), (batch, groups, N, L)) or groups < 1 or dim % groups:
        raise ValueError(
            f"{name} must have shape (dim, N) = {(dim, N)}, (batch, N, L) = {(batch, N, L)} or "
            f"(batch, groups, N, L) with groups dividing {dim}, got {shape}"
        )
