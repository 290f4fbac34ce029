"""The reference implementation of the scan compared with a loop: values, gradients, precision, errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spatial_mamba.kernels import selective_scan

from .inputs import (
    BATCH,
    DELTA_SCALES,
    DIM,
    assert_near,
    assert_wrong_tensors_are_refused,
    generator,
    half_types,
    scan_inputs,
    scan_loop,
)

pytestmark = pytest.mark.usefixtures("reference_backend")
LENGTHS = (1, 7, 64, 1000)
all_state_sizes = pytest.mark.parametrize("n", [1, 4, 16])
all_groups = pytest.mark.parametrize("groups", [1, 2])
all_delta_scales = pytest.mark.parametrize("scale", DELTA_SCALES)


def assert_same_results(
    actual: Callable[..., tuple[Tensor, ...]],
    expected: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    tolerance: float,
) -> None:
    """Two functions agree in their outputs and in the gradients of a random weighting of all outputs."""
    outputs, gradients = [], []
    for function in (actual, expected):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        results = function(**leaves)
        loss = sum((r * torch.randn(r.shape, generator=generator(1), dtype=r.dtype)).sum() for r in results)
        outputs.append(results)
        gradients.append(torch.autograd.grad(loss, list(leaves.values())))
    for i, pair in enumerate(zip(*outputs, strict=True)):
        assert_near(*pair, tolerance, f"output {i}")
    for name, *pair in zip(inputs, *gradients, strict=True):
        assert_near(*pair, tolerance, f"gradient of {name}")


@all_state_sizes
@all_groups
@all_delta_scales
@pytest.mark.parametrize("length", [*LENGTHS, 3136])
def test_scan_in_float32_matches_the_loop(n: int, groups: int, scale: str, length: int) -> None:
    inputs = scan_inputs(n, length, groups, scale)
    y = selective_scan(**{name: value.float() for name, value in inputs.items()})
    assert y.dtype == torch.float32
    assert_near(y, scan_loop(**inputs)[0], 1e-5)


@all_state_sizes
@all_groups
@all_delta_scales
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_gradients_match_the_loop(n: int, groups: int, scale: str, length: int) -> None:
    # Each gradient has its own scale: at tiny delta, that of A is about 1e-12 of the others.
    inputs = scan_inputs(n, length, groups, scale)
    assert_same_results(lambda **kw: (selective_scan(**kw),), lambda **kw: scan_loop(**kw)[:1], inputs, 1e-9)


@pytest.mark.parametrize("layout", ["dim-N", "batch-N-L", "batch-G-N-L"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("C",),
        ("C", "D"),
        ("C", "z"),
        ("delta_bias",),
        ("C", "delta_softplus"),
        ("delta_bias", "delta_softplus"),
        ("C", "D", "z", "delta_bias", "delta_softplus"),
    ],
    ids="+".join,
)
def test_scan_options_and_layouts_match_the_loop(options: tuple[str, ...], layout: str) -> None:
    n, length, g = 3, 9, generator()
    shape = {"dim-N": (DIM, n), "batch-N-L": (BATCH, n, length), "batch-G-N-L": (BATCH, 2, n, length)}[layout]
    shapes = {"B": shape, "C": shape, "D": (DIM,), "z": (BATCH, DIM, length), "delta_bias": (DIM,)}
    inputs = {name: value for name, value in scan_inputs(n, length).items() if name in ("u", "delta", "A")}
    for name, its_shape in shapes.items():
        if name == "B" or name in options:
            inputs[name] = torch.randn(its_shape, generator=g, dtype=torch.float64)
    softplus = "delta_softplus" in options

    assert_same_results(
        lambda **kw: selective_scan(**kw, delta_softplus=softplus, return_last_state=True),
        lambda **kw: scan_loop(**kw, delta_softplus=softplus),
        inputs,
        1e-9,
    )


def test_scan_accepts_different_layouts_of_b_and_c() -> None:
    inputs = scan_inputs(3, 9) | {"C": torch.randn(DIM, 3, generator=generator(), dtype=torch.float64)}
    assert_near(selective_scan(**inputs), scan_loop(**inputs)[0], 1e-9)


@half_types
def test_scan_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: value.to(dtype) for name, value in scan_inputs(4, 100, 2).items()}
    outputs, last = selective_scan(**inputs, return_last_state=True)
    expected, expected_last = selective_scan(**{k: v.float() for k, v in inputs.items()}, return_last_state=True)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, expected.to(dtype))
    assert last.dtype == torch.float32
    assert torch.equal(last, expected_last)

    states = selective_scan(**inputs | {"C": None})
    assert states.dtype == torch.float32
    assert torch.equal(states[..., -1], expected_last)


@half_types
def test_autocast_does_not_change_the_scan(dtype: torch.dtype) -> None:
    inputs = {name: value.float().requires_grad_() for name, value in scan_inputs(4, 100).items()}
    inputs["D"] = inputs["delta_bias"] = torch.ones(DIM)
    inputs["z"] = torch.randn(BATCH, DIM, 100, generator=generator())
    expected = selective_scan(**inputs, delta_softplus=True)
    expected_gradient = torch.autograd.grad(expected.sum(), inputs["u"])[0]
    with torch.autocast("cpu", dtype=dtype):
        y = selective_scan(**inputs, delta_softplus=True)
        gradient = torch.autograd.grad(y.sum(), inputs["u"])[0]
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.ones(BATCH, 3, 3, 5)}, "^B must have shape .* groups dividing 4"),
        ({"C": None, "D": torch.ones(DIM)}, "^D and z .* pass C"),
        ({"C": None, "z": torch.ones(BATCH, DIM, 5)}, "^D and z .* pass C"),
    ],
)
def test_scan_refuses(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_inputs(3, 5) | change)


def test_scan_refuses_wrong_tensors() -> None:
    more = {"D": torch.ones(DIM), "z": torch.ones(BATCH, DIM, 5), "delta_bias": torch.ones(DIM)}
    assert_wrong_tensors_are_refused(
        selective_scan,
        scan_inputs(3, 5) | more,
        u=[(DIM, 5), (BATCH, DIM, 0)],
        delta=[(BATCH, DIM, 6)],
        A=[(DIM,), (DIM + 1, 3)],
        B=[(DIM,), (DIM, 2), (BATCH, 3, 6), (BATCH, 0, 3, 5)],
        C=[(BATCH, 2, 2, 5)],
        D=[(DIM, 1)],
        z=[(BATCH, DIM, 1)],
        delta_bias=[(1,)],
    )
