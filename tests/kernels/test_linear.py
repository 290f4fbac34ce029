"""The reference implementation of the linear layer compared with sums over channels, and what it refuses."""

from pathlib import Path
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
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(0, INPUTS)}, r"^weight must have shape \(outputs, inputs\) with outputs, inputs >= 1"),
        ({"weight": torch.ones(OUTPUTS, 0), "x": torch.ones(5, 0)}, "^weight must have shape"),
        ({"weight": torch.ones(INPUTS)}, "^weight must have shape"),
        ({"x": torch.ones(2, INPUTS + 1)}, rf"^x must have shape \(\.\.\., {INPUTS}\), got \(2, {INPUTS + 1}\)$"),
        ({"x": torch.tensor(1.0)}, r"^x must have shape .*, got \(\)$"),
    ],
)
def test_linear_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**linear_inputs() | change)


@pytest.mark.usefixtures("reference_backend")
def test_linear_refuses_types_and_devices() -> None:
    assert_types_and_devices_are_refused(linear, linear_inputs())


def test_gradients_of_transposed_factors() -> None:
    """The registered operator, which exported programs call, without the copies that `linear` makes."""
    x, weight = torch.randn(70, 256).t().requires_grad_(), torch.randn(70, 100).t().requires_grad_()
    grad = torch.randn(256, 100)
    found = torch.autograd.grad(torch.ops.spatial_mamba.linear(x, weight), (x, weight), grad)
    assert_near(found[0], grad.double() @ weight.double(), 1e-5)
    assert_near(found[1], grad.double().t() @ x.double(), 1e-5)


def test_no_outputs() -> None:
    assert torch.ops.spatial_mamba.linear(torch.ones(256, 8), torch.ones(0, 8)).shape == (256, 0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_new_numbers_of_tokens_need_no_new_machine_code() -> None:
    """oneDNN generates code for each size of a product, and PyTorch keeps it."""
    weight = torch.ones(64, 64, requires_grad=True)

    def train(numbers: range) -> None:
        for tokens in numbers:
            linear(torch.ones(tokens, 64, requires_grad=True), weight).sum().backward()

    train(range(256, 1300, 13))
    before = executable_memory()
    train(range(257, 1300, 13))
    assert executable_memory() - before < 2**20


def executable_memory() -> int:
    """Bytes of machine code in this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if "x" in line[1]]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, 3, INPUTS), (INPUTS,)])
def test_linear_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    inputs = [torch.ones(shape, requires_grad=True), torch.ones(OUTPUTS, INPUTS, requires_grad=True)]
    out = linear(*inputs)
    assert out.shape == (*shape[:-1], OUTPUTS)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
