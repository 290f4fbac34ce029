"""The reference implementation of the linear layer compared with sums over channels, and what it refuses."""

from typing import Any

import pytest
import torch

from spatial_mamba.kernels import linear

from .inputs import assert_near, assert_types_and_devices_are_refused, generator

INPUTS, OUTPUTS = 4, 3


def linear_inputs() -> dict[str, Any]:
    g = generator()
    return {"x": torch.randn(2, 5, INPUTS, generator=g), "weight": torch.randn(OUTPUTS, INPUTS, generator=g)}


@pytest.mark.usefixtures("reference_backend")
def test_linear_matches_sums_over_channels() -> None:
    inputs = linear_inputs()
    x, weight = (value.double() for value in inputs.values())
    assert_near(linear(**inputs), (x[..., None, :] * weight).sum(-1), 1e-6)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("shape", [(OUTPUTS, INPUTS + 1), (INPUTS,), (0, INPUTS)])
def test_linear_refuses_other_weights(shape: tuple[int, ...]) -> None:
    message = rf"^weight must have shape \(outputs, inputs\) with inputs = {INPUTS}, outputs >= 1, got"
    with pytest.raises(ValueError, match=message):
        linear(**linear_inputs() | {"weight": torch.ones(shape)})


@pytest.mark.usefixtures("reference_backend")
def test_linear_refuses_types_and_devices() -> None:
    assert_types_and_devices_are_refused(linear, linear_inputs())


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, 3, INPUTS), (INPUTS,)])
def test_linear_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    inputs = [torch.ones(shape, requires_grad=True), torch.ones(OUTPUTS, INPUTS, requires_grad=True)]
    out = linear(*inputs)
    assert out.shape == (*shape[:-1], OUTPUTS)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
