"""The reference implementation of the convolution compared with sums of shifted maps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_mamba.kernels import depthwise_conv

from .inputs import BATCH, DIM, assert_near, assert_wrong_tensors_are_refused, generator

pytestmark = pytest.mark.usefixtures("reference_backend")


def conv_inputs() -> dict[str, Any]:
    g = generator()
    return dict(
        x=torch.randn(BATCH, 4, 5, DIM, generator=g),
        weight=torch.randn(DIM, 1, 3, 3, generator=g),
        bias=torch.randn(DIM, generator=g),
    )


def convolve_by_shifting(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sums of nine shifted maps, in float64."""
    height, width = x.shape[1:3]
    padded = F.pad(x.double(), (0, 0, 1, 1, 1, 1))
    return bias.double() + sum(
        weight[:, 0, i, j].double() * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )


def test_conv_matches_shifted_sums() -> None:
    inputs = conv_inputs()
    convolved = convolve_by_shifting(**inputs)
    for epilogue, expected in {
        "none": convolved,
        "silu": convolved / (1 + torch.exp(-convolved)),
        "residual": inputs["x"] + convolved,
    }.items():
        y = depthwise_conv(**inputs, epilogue=epilogue)
        assert y.is_contiguous()
        assert_near(y, expected, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(DIM, 9)}, r"^weight must have shape \(dim, 1, 3, 3\) with dim = 4, got \(4, 9\)"),
        ({"epilogue": "relu"}, "^epilogue must be one of none, silu, residual, got 'relu'"),
    ],
)
def test_conv_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**conv_inputs() | change)


def test_conv_refuses_wrong_tensors() -> None:
    assert_wrong_tensors_are_refused(
        depthwise_conv,
        conv_inputs(),
        x=[(DIM, 4, 5), (BATCH, 4, 0, DIM)],
        weight=[(DIM + 1, 1, 3, 3), (DIM, 1, 5, 5)],
        bias=[(1,)],
    )
