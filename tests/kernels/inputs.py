"""Inputs of the operators; slow, obvious implementations of the scan and the fusion; comparisons."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

BATCH, DIM = 2, 4
# A is in [-1.5, -0.5]: at the huge scale every decay underflows to 0, even in float64.
DELTA_SCALES = {"tiny": 1e-6, "normal": 1.0, "huge": 1e4}
half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_inputs(n: int, length: int, groups: int = 1, scale: str = "normal") -> dict[str, Tensor]:
    """Inputs in float64 that float32 represents exactly, so that errors do not include their rounding."""
    g = generator()
    inputs = {
        "u": torch.randn(BATCH, DIM, length, generator=g),
        "delta": DELTA_SCALES[scale] * (0.5 + torch.rand(BATCH, DIM, length, generator=g)),
        "A": -0.5 - torch.rand(DIM, n, generator=g),
        "B": torch.randn(BATCH, groups, n, length, generator=g),
        "C": torch.randn(BATCH, groups, n, length, generator=g),
    }
    return {name: value.double() for name, value in inputs.items()}


def scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence one token at a time: outputs (states without C), and the last state."""
    batch, dim, length = u.shape

    def per_token(matrix: Tensor) -> Sequence[Tensor]:
        # unbind, because the gradients of L separate index operations would take time proportional to L squared
        if matrix.ndim == 2:
            return [matrix] * length
        if matrix.ndim == 3:
            return matrix[:, None].unbind(-1)
        group_of_channel = torch.arange(dim) * matrix.shape[1] // dim
        return matrix[:, group_of_channel].unbind(-1)

    if delta_bias is not None:
        delta = delta + delta_bias[None, :, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))

    h = u.new_zeros(batch, dim, A.shape[1])
    states = []
    for u_t, delta_t, B_t in zip(u[..., None, :].unbind(-1), delta[..., None, :].unbind(-1), per_token(B), strict=True):
        h = torch.exp(delta_t * A) * h + delta_t * B_t * u_t
        states.append(h)
    if C is None:
        return torch.stack(states, -1), h

    y = torch.stack([(h_t * C_t).sum(-1) for h_t, C_t in zip(states, per_token(C), strict=True)], -1)
    if D is not None:
        y = y + D[None, :, None] * u
    if z is not None:
        y = y * z * torch.sigmoid(z)
    return y, h


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Equal shapes, and equal values within ``tolerance`` of the largest magnitude expected."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"{name} is off by {error:.3g}"


def fusion_inputs(height: int, width: int, branches: int = 3, size: int = 3) -> tuple[Tensor, list[Tensor], Tensor]:
    g = generator()
    h = torch.randn(BATCH, DIM, height, width, generator=g)
    kernels = [torch.randn(DIM, 1, size, size, generator=g) for _ in range(branches)]
    return h, kernels, torch.randn(branches, generator=g)


def fuse_by_gathering(h: Tensor, kernels: Sequence[Tensor], alpha: Tensor, dilations: Sequence[int]) -> Tensor:
    """Every neighbour looked up by its clamped position, in float64."""
    height, width = h.shape[2:]
    fused = torch.zeros_like(h, dtype=torch.float64)
    for kernel, weight, dilation in zip(kernels, alpha, dilations, strict=True):
        size = kernel.shape[-1]
        for i in range(size):
            for j in range(size):
                rows = (torch.arange(height) + dilation * (i - size // 2)).clamp(0, height - 1)
                columns = (torch.arange(width) + dilation * (j - size // 2)).clamp(0, width - 1)
                neighbours = h.double()[:, :, rows[:, None], columns]
                fused += weight.double() * kernel[:, 0, i, j].double()[:, None, None] * neighbours
    return fused


def core_inputs() -> dict[str, Any]:
    """H = 4, W = 5 and R = 3."""
    g = generator()
    return dict(
        u=torch.randn(BATCH, 4, 5, DIM, generator=g),
        projection=torch.randn(BATCH, 4, 5, 5, generator=g),
        step_weight=torch.randn(DIM, 3, generator=g),
        step_bias=torch.randn(DIM, generator=g),
        A_log=torch.randn(DIM, generator=g),
        D=torch.randn(DIM, generator=g),
        kernels=[torch.randn(DIM, 1, 3, 3, generator=g) for _ in range(3)],
        alpha=torch.randn(3, generator=g),
    )


def assert_wrong_tensors_are_refused(
    function: Callable[..., Tensor], inputs: dict[str, Any], **shapes: Sequence[tuple[int, ...]]
) -> None:
    """Wrong ``shapes`` are errors, and so are tensors of other types or not on the device of the first one."""
    for name, wrong in shapes.items():
        for shape in wrong:
            with pytest.raises(ValueError, match=f"^{name} must have shape .* got {re.escape(str(shape))}$"):
                function(**inputs | {name: torch.ones(shape)})
    first, *_ = names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in names:
        for dtype in (torch.complex64, torch.int64):
            message = f"^{re.escape(name)} must be of a real floating-point type, got {dtype}"
            with pytest.raises(TypeError, match=message):
                function(**inputs | {name: inputs[name].to(dtype)})
        other = r"\S+" if name == first else re.escape(name)
        with pytest.raises(ValueError, match=f"^{other} must be on the device of {first}"):
            function(**inputs | {name: inputs[name].to("meta")})
