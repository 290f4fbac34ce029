"""The selective scan (S6)."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrence import linear_recurrence
from .registration import Operator
from .tensors import check_tensors

# Per element and state: the exponential and its argument, the two products and the sum of the recurrence, and the
# product and the sum that read it out: the count of the published tables.
SCAN_FLOPS = 7


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y_t = C_t h_t + D u_t`` over L tokens.

    The signature and layouts are those of mamba_ssm's ``selective_scan_fn``; real A only.
    The recurrence is computed in float32 (float64 for float64 input), also under autocast.
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2; Spatial-Mamba reads the states (``C=None``).

    Args:
        u: (batch, dim, L), the tokens.
        delta: (batch, dim, L), the step sizes, before ``delta_bias`` and softplus.
        A: (dim, N), negative for a recurrence that decays.
        B: (dim, N), (batch, N, L) or (batch, groups, N, L); groups must divide dim.
        C: as B; ``None`` returns the states instead of the outputs.
        D: (dim,), weight of the skip connection.
        z: (batch, dim, L), the output is multiplied by ``silu(z)``.
        delta_bias: (dim,), added to ``delta``.
        delta_softplus: apply softplus to the biased ``delta``.
        return_last_state: also return ``h_L``.

    Returns:
        Outputs (batch, dim, L) in the dtype of ``u``; or, for ``C=None``, states (batch, dim, N, L) in the
        dtype of the recurrence. With ``return_last_state`` a pair, the last state being (batch, dim, N).

    Raises:
        ValueError: for a shape or device that fits none of the above, or D or z without C.
        TypeError: for a tensor that is not of a real floating-point type.
    """
    _check_arguments(u, delta, A, B, C, D, z, delta_bias)
    compute_dtype = torch.promote_types(u.dtype, torch.float32)
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
    """The reference implementation: outputs (batch, dim, L), or states (batch, dim, N, L) without C; last states.

    B and C are (batch, groups, N, L); A, D and delta_bias of the compute dtype.
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


def _forward(backend: ModuleType, *arguments: Any) -> tuple[Tensor, Tensor]:
    return backend.selective_scan(*arguments)


def _backward(backend: ModuleType, *arguments: Any) -> Sequence[Tensor]:
    return backend.selective_scan_backward(*arguments)


def _fake(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(u) if C is not None else A.new_empty(*u.shape[:2], A.shape[1], u.shape[2])
    return out, A.new_empty(*u.shape[:2], A.shape[1])


def _flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any) -> int:
    return SCAN_FLOPS * u[0] * u[2] * A[0] * A[1]


SELECTIVE_SCAN = Operator(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
    reference,
    _forward,
    _fake,
    _backward,
    flops=_flops,
)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _grouped(B: Tensor, C: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bring any accepted layouts of B and C to (batch, groups, N, L), of equally many groups."""
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
    return tuple(x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], dim=1) for x in (B, C))


def _per_channel(matrix: Tensor, dim: int) -> Tensor:
    """Bring (batch, groups, N, L) to what broadcasts against (batch, dim, N, L)."""
    groups = matrix.shape[1]
    return matrix if groups == 1 else matrix.repeat_interleave(dim // groups, dim=1)


def _check_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3 or u.shape[2] < 1:
        raise ValueError(f"u must be (batch, dim, L) with L >= 1, got {tuple(u.shape)}")
    batch, dim, length = u.shape
    if A.ndim != 2 or A.shape[0] != dim:
        raise ValueError(f"A must be (dim, N) with dim = {dim}, got {tuple(A.shape)}")
    if C is None and (D is not None or z is not None):
        raise ValueError("D and z act on the outputs: pass C too, or leave them out to get the states")

    for name, tensor, shape in (
        ("delta", delta, (batch, dim, length)),
        ("z", z, (batch, dim, length)),
        ("D", D, (dim,)),
        ("delta_bias", delta_bias, (dim,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to go with u of {tuple(u.shape)}, got {tuple(tensor.shape)}")

    d_state = A.shape[1]
    for name, matrix in (("B", B), ("C", C)):
        if matrix is None:
            continue
        shape = tuple(matrix.shape)
        grouped = len(shape) == 4 and shape[1] >= 1 and dim % shape[1] == 0
        if not (
            shape == (dim, d_state)
            or shape == (batch, d_state, length)
            or (grouped and shape == (batch, shape[1], d_state, length))
        ):
            raise ValueError(
                f"{name} must be (dim, N) = {(dim, d_state)}, (batch, N, L) = {(batch, d_state, length)} or "
                f"(batch, groups, N, L) with groups dividing {dim}, got {shape}"
            )
    check_tensors(dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias))
