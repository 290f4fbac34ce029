"""The reference implementation of the gated norm compared with its formula."""

from typing import Any

import pytest
import torch

from spatial_mamba.kernels import gated_norm

from .inputs import BATCH, DIM, assert_near, assert_wrong_tensors_are_refused, generator, half_types

pytestmark = pytest.mark.usefixtures("reference_backend")


def norm_inputs() -> dict[str, Any]:
    g = generator()
    return dict(
        y=3 * torch.randn(BATCH, 4, 5, DIM, generator=g) + 1,
        gate=torch.randn(BATCH, 4, 5, DIM, generator=g),
        weight=torch.randn(DIM, generator=g),
        bias=torch.randn(DIM, generator=g),
    )


def test_norm_matches_moments() -> None:
    y, gate, weight, bias = (x.double() for x in norm_inputs().values())
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
    expected = (normed * weight + bias) * gate / (1 + torch.exp(-gate))
    assert_near(gated_norm(**norm_inputs(), eps=1e-3), expected, 1e-6)


@half_types
def test_norm_is_rounded_once(dtype: torch.dtype) -> None:
    inputs = norm_inputs() | {"gate": norm_inputs()["gate"].to(dtype)}
    out = gated_norm(**inputs)  # y in float32
    assert out.dtype == dtype
    assert torch.equal(out, gated_norm(**inputs | {"gate": inputs["gate"].float()}).to(dtype))


def test_norm_refuses_wrong_tensors() -> None:
    assert_wrong_tensors_are_refused(
        gated_norm,
        norm_inputs(),
        y=[(DIM, 4, 5), (BATCH, 0, 5, DIM)],
        weight=[(DIM, 1)],
        bias=[(1,)],
    )
    with pytest.raises(ValueError, match=r"^gate must have shape .* with .* dim = 4, got"):
        gated_norm(**norm_inputs() | {"gate": torch.ones(BATCH, 4, 5, DIM + 1)})
