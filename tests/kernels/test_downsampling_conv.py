"""The reference implementation of the downsampling convolution compared with every second token of a plain one."""

from typing import Any

import pytest
import torch

from spatial_mamba.kernels import downsampling_conv

from .inputs import DIM, assert_near, assert_types_and_devices_are_refused
from .test_depthwise_conv import conv_inputs, convolve_by_shifting

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("size", [(4, 5), (3, 2)])
def test_downsampling_conv_matches_every_second_token(size: tuple[int, int]) -> None:
    height, width = size
    inputs = conv_inputs()
    inputs["x"] = inputs["x"][:, :height, :width]
    rectified = inputs | {"x": inputs["x"].clamp(min=0)}
    assert_near(downsampling_conv(**inputs), convolve_by_shifting(**rectified)[:, ::2, ::2].clamp(min=0), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(DIM, 4, 5)}, "^x must have shape"),
        ({"weight": torch.ones(DIM, 1, 5, 5)}, "^weight must have shape"),
        ({"bias": torch.ones(1)}, "^bias must have shape"),
    ],
)
def test_downsampling_conv_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        downsampling_conv(**conv_inputs() | change)


def test_downsampling_conv_refuses_types_and_devices() -> None:
    assert_types_and_devices_are_refused(downsampling_conv, conv_inputs())
