"""Every backend compared with the reference implementation in float64; PyTorch's tools applied to the operators."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba.kernels import (
    backends,
    depthwise_conv,
    downsampling,
    gated_norm,
    layer_norm,
    mlp,
    selective_scan,
    spatial_mixer,
    state_fusion,
    structure_aware_scan,
    use_backend,
)
from spatial_mamba.kernels.benchmark.cases import ACTIVATIONS
from spatial_mamba.kernels.layer_norm import LAYER_NORM
from spatial_mamba.kernels.registration import Operator
from spatial_mamba.kernels.state_fusion import merge_taps

from .inputs import generator

Case = tuple[Callable[..., Any], dict[str, Tensor]]  # a function, and its tensors in float64


def on(*backends: Any) -> pytest.MarkDecorator:
    """Run a test on backends, each given as its name and the device."""
    return pytest.mark.parametrize("backend", backends, ids="-on-".join, indirect=True)


COMPILED = [("cpu", "cpu"), *(pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
INTERPRETED = pytest.param(("triton", "cpu"), marks=pytest.mark.slow)
compiled_backends = on(*COMPILED)
all_backends = on(*COMPILED, INTERPRETED)
with_reference = on(*COMPILED, INTERPRETED, ("torch", "cpu"))
SINGLE_TOLERANCE = {"output": 1e-5, "gradient": 3e-5}  # of the largest magnitude
HALF_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Force a backend; returns the device on which it runs."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton runs on the GPU here, not in its interpreter")
    reason = backends.why_not(name, device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with use_backend(name):
        yield torch.device(device)


def interpreted(request: pytest.FixtureRequest) -> bool:
    return request.node.callspec.params["backend"] == ("triton", "cpu")


def normals() -> Callable[..., Tensor]:
    """A function that draws float64 tensors of given shapes."""
    return partial(torch.randn, generator=generator(), dtype=torch.float64)


def scan_case(
    batch: int = 2,
    dim: int = 6,
    length: int = 70,
    n: int = 3,
    groups: int = 2,
    options: str = "C D z bias softplus",
    scale: float = 1.0,
    matrices: str = "grouped",
) -> Case:
    """A selective scan with ``options``."""
    normal, uniform = normals(), partial(torch.rand, generator=generator(1), dtype=torch.float64)
    shapes = {"grouped": (batch, groups, n, length), "shared": (batch, n, length), "constant": (dim, n)}
    B, C = (shapes[layout] for layout in (matrices.split(", ") * 2)[:2])
    tensors = {
        "u": normal(batch, dim, length),
        "delta": scale * (0.1 + uniform(batch, dim, length)),
        "A": -0.3 - uniform(dim, n),
        "B": normal(*B),
    }
    optional = {"C": normal(*C), "D": normal(dim), "z": normal(batch, dim, length), "delta_bias": normal(dim)}
    tensors |= {name: value for name, value in optional.items() if name.removeprefix("delta_") in options.split()}
    return lambda **kw: selective_scan(**kw, delta_softplus="softplus" in options, return_last_state=True), tensors


def fusion_case(
    batch: int = 2, dim: int = 5, height: int = 6, width: int = 7, dilations: tuple[int, ...] = (1, 3, 5), size: int = 3
) -> Case:
    """State fusion."""
    normal = normals()
    tensors = {"h": normal(batch, dim, height, width), **fusion_weights(normal, dim, dilations, size)}

    def function(h: Tensor, alpha: Tensor, **kernels: Tensor) -> tuple[Tensor]:
        return (state_fusion(h, list(kernels.values()), alpha, dilations),)

    return function, tensors


def core_case(
    batch: int = 2,
    height: int = 6,
    width: int = 7,
    dim: int = 5,
    rank: int = 3,
    dilations: tuple[int, ...] = (1, 3, 5),
    size: int = 3,
    step: float = -1.0,
    out_dtype: torch.dtype | None = None,
) -> Case:
    """The scan with state fusion, steps around softplus(``step``)."""
    normal = normals()
    tensors = {
        "u": normal(batch, height, width, dim),
        "projection": normal(batch, height, width, rank + 2),
        "step_weight": 0.3 * normal(dim, rank),
        "step_bias": 0.5 * normal(dim) + step,
        "A_log": 0.5 * normal(dim),
        "D": normal(dim),
        **fusion_weights(normal, dim, dilations, size),
    }

    def function(alpha: Tensor, **kw: Tensor) -> tuple[Tensor]:
        kernels = [kw.pop(f"kernel_{k}") for k in range(len(dilations))]
        return (structure_aware_scan(**kw, kernels=kernels, alpha=alpha, dilations=dilations, out_dtype=out_dtype),)

    return function, tensors


def conv_case(
    batch: int = 2,
    height: int = 6,
    width: int = 7,
    dim: int = 5,
    epilogue: str = "silu",
    margins: tuple[int, int] = (0, 0),
) -> Case:
    """A depthwise convolution, of a whole map, or of a slice with ``margins`` of channels before and after it."""
    normal, (before, after) = normals(), margins
    tensors = {
        "x": normal(batch, height, width, before + dim + after),
        "weight": 0.5 * normal(dim, 1, 3, 3),
        "bias": normal(dim),
    }

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (depthwise_conv(x[..., before : before + dim], weight, bias, epilogue),)

    return function, tensors


def norm_case(
    batch: int = 2, height: int = 6, width: int = 7, dim: int = 5, margins: tuple[int, int] = (0, 0), y: str = "y"
) -> Case:
    """A gated norm, the gate sliced as above; ``y="single y"`` stays in float32."""
    normal, (before, after) = normals(), margins
    tensors = {
        y: 2 * normal(batch, height, width, dim) + 1,
        "gate": normal(batch, height, width, before + dim + after),
        "weight": normal(dim),
        "bias": normal(dim),
    }

    def function(gate: Tensor, weight: Tensor, bias: Tensor, **kw: Tensor) -> tuple[Tensor]:
        return (gated_norm(kw[y], gate[..., before : before + dim], weight, bias),)

    return function, tensors


def layer_norm_case(batch: int = 2, height: int = 6, width: int = 7, dim: int = 5) -> Case:
    """A LayerNorm without a gate."""
    normal = normals()
    tensors = {"x": 2 * normal(batch, height, width, dim) + 1, "weight": normal(dim), "bias": normal(dim)}

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        # `layer_norm` runs the operator only on GPUs.
        return ((layer_norm if x.is_cuda else LAYER_NORM)(x, weight, bias, 1e-5),)

    return function, tensors


def downsampling_case(
    batch: int = 2, height: int = 6, width: int = 7, dim: int = 4, hidden: int = 5, outputs: int = 3
) -> Case:
    """Two linear layers with the convolution of stride 2 between them."""
    normal = normals()
    tensors = {
        "x": normal(batch, height, width, dim),
        "expand": normal(hidden, dim),
        "expand_bias": normal(hidden),
        "conv_weight": normal(hidden, 1, 3, 3),
        "conv_bias": normal(hidden),
        "project": normal(outputs, hidden),
        "project_bias": normal(outputs),
    }
    return lambda **kw: (downsampling(**kw),), tensors


def mlp_case(batch: int = 9, dim: int = 5, hidden: int = 7, outputs: int = 6) -> Case:
    """Two linear layers with the GELU between them, for ``batch`` tokens."""
    normal = normals()
    tensors = {
        "x": normal(batch, dim),
        "expand": normal(hidden, dim),
        "expand_bias": normal(hidden),
        "project": normal(outputs, hidden),
        "project_bias": normal(outputs),
    }
    return lambda **kw: (mlp(**kw),), tensors


def mixer_case(
    batch: int = 2,
    height: int = 6,
    width: int = 7,
    dim: int = 5,
    rank: int = 3,
    dilations: tuple[int, ...] = (1, 3, 5),
    size: int = 3,
    merged: bool = False,
) -> Case:
    """Everything between the projections of a block, with kernels or with ``merged`` taps."""
    normal = normals()
    tensors = {
        "xz": normal(batch, height, width, 2 * dim),
        "conv_weight": 0.5 * normal(dim, 1, 3, 3),
        "conv_bias": normal(dim),
        "projection_weight": normal(rank + 2, dim),
        "step_weight": 0.3 * normal(dim, rank),
        "step_bias": 0.5 * normal(dim) - 1,
        "A_log": 0.5 * normal(dim),
        "D": normal(dim),
        "norm_weight": normal(dim),
        "norm_bias": normal(dim),
    }
    fusion = fusion_weights(normal, dim, dilations, size)
    if merged:
        alpha = fusion.pop("alpha")
        fusion = {"taps": merge_taps(list(fusion.values()), alpha, dilations)}

    def function(alpha: Tensor | None = None, **kw: Tensor) -> tuple[Tensor]:
        kernels = None if merged else [kw.pop(f"kernel_{k}") for k in range(len(dilations))]
        return (spatial_mixer(**kw, kernels=kernels, alpha=alpha, dilations=dilations),)

    return function, tensors | fusion


def fusion_weights(normal: Callable[..., Tensor], dim: int, dilations: tuple[int, ...], size: int) -> dict[str, Tensor]:
    kernels = {f"kernel_{k}": normal(dim, 1, size, size) for k in range(len(dilations))}
    return kernels | {"alpha": normal(len(dilations))}


def results(function: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random weighting of them."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    # Multiples of 1/8, which every dtype holds exactly.
    weights = [torch.randint(-16, 17, out.shape, generator=generator(1)) / 8 for out in outputs]
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [w.to(out.device, out.dtype) for w, out in zip(weights, outputs, strict=True)]
    )
    named = {f"output {i}": out for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    assert actual.shape == expected.shape
    largest = expected.abs().max().item()
    # Treat as 0 what float32 rounds to 0: gradients of decays that underflowed.
    difference = (actual.double().cpu() - expected).abs().max().item()
    return difference / largest if largest > 1e-30 else difference


def assert_matches_reference(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rounds_within: bool = False,
) -> None:
    """Values and gradients match the reference implementation in float64, as closely as ``dtype`` allows.

    Activations are in ``dtype``, weights in float32. At extreme delta float32 itself loses digits. The tolerance is
    therefore at least four times the error of the reference implementation in float32, or in ``dtype`` if
    ``rounds_within``.
    """
    rounded = {name: t.to(dtype if name in ACTIVATIONS else torch.float32) for name, t in tensors.items()}
    actual = results(function, {name: t.to(device) for name, t in rounded.items()})
    with use_backend("torch"):
        expected = results(function, {name: t.double() for name, t in rounded.items()})
        single = results(function, rounded if rounds_within else {name: t.float() for name, t in rounded.items()})
    for name, value in actual.items():
        assert value.isfinite().all(), name
        tolerance = max(SINGLE_TOLERANCE[name.split()[0]], 4 * error(single[name], expected[name]))
        if value.dtype in HALF_TOLERANCE:
            tolerance = max(HALF_TOLERANCE[value.dtype], tolerance if rounds_within else 0.0)
        assert error(value, expected[name]) <= tolerance, name


OPERATORS = {
    "selective_scan": scan_case,
    "state_fusion": fusion_case,
    "structure_aware_scan": core_case,
    "depthwise_conv": conv_case,
    "gated_norm": norm_case,
    "layer_norm": layer_norm_case,
    "downsampling": downsampling_case,
    "mlp": mlp_case,
    "spatial_mixer": mixer_case,
}

FUSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"batch": 1, "dim": 1, "height": 1, "width": 1},
    "one row": {"height": 1, "width": 19},
    "one column": {"height": 12, "width": 1},
    "smaller than the reach": {"height": 3, "width": 4, "dim": 17},
    "far smaller than the reach": {"height": 3, "width": 4, "dilations": (1, 30_000)},
    "larger than a block": {"height": 13, "width": 31, "dim": 18, "batch": 1},
    "one dilation": {"dilations": (2,)},
    "kernels of 5": {"dilations": (1, 2), "size": 5},
}
# Options of the functions in `OPERATORS`, by name of the case.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "selective_scan": {
        "all options": {},
        "states": {"options": ""},
        "states, softplus": {"options": "bias softplus"},
        "outputs": {"options": "C"},
        "skip": {"options": "C D"},
        "gate": {"options": "C z"},
        "one token": {"length": 1},
        "one channel, one state": {"batch": 1, "dim": 1, "n": 1, "groups": 1, "length": 9},
        "many states and tokens": {"batch": 1, "dim": 3, "n": 16, "groups": 1, "length": 301},
        "a group per channel": {"groups": 6},
        "channels beyond a vector": {"dim": 35, "groups": 1, "length": 17},
        "matrices shared": {"matrices": "shared"},
        "matrices constant": {"matrices": "constant"},
        "matrices of different layouts": {"matrices": "constant, shared"},
        "matrices of different groups": {"matrices": "shared, grouped"},
        "tiny steps": {"options": "C D", "scale": 1e-6},
        "huge steps": {"options": "C D", "scale": 1e4},
    },
    "state_fusion": FUSIONS,
    "structure_aware_scan": {
        **FUSIONS,
        "rank beyond a vector": {"rank": 19},
        "steps near 0": {"step": -60.0},
        "small steps": {"step": -12.0},
        "huge steps": {"step": 60.0},
    },
    "depthwise_conv": {
        "plain": {"epilogue": "none"},
        "silu": {},
        "residual": {"epilogue": "residual"},
        "one token": {"batch": 1, "dim": 1, "height": 1, "width": 1},
        "one row": {"height": 1, "width": 19},
        "one column": {"height": 12, "width": 1, "epilogue": "residual"},
        "channels beyond a vector": {"height": 3, "width": 4, "dim": 37},
        "rows beyond a tile": {"batch": 1, "height": 15, "width": 3, "epilogue": "residual"},
        "larger than a block": {"batch": 1, "height": 19, "width": 21, "dim": 70},
        "larger than a block, plain": {"batch": 1, "height": 19, "width": 21, "dim": 70, "epilogue": "none"},
        "half of a map": {"dim": 32, "margins": (32, 0)},
        "channels of a map": {"dim": 17, "margins": (1, 3), "epilogue": "residual"},
    },
    "gated_norm": {
        "plain": {},
        "one token": {"batch": 1, "height": 1, "width": 1, "dim": 3},
        "one row": {"height": 1, "width": 19},
        "one column": {"height": 12, "width": 1},
        "channels beyond a vector": {"dim": 37},
        "larger than a block": {"height": 13, "width": 31, "dim": 150},
        "half of a map": {"dim": 32, "margins": (32, 0)},
        "channels of a map": {"dim": 17, "margins": (1, 3)},
    },
    "layer_norm": {
        "plain": {},
        "one token": {"batch": 1, "height": 1, "width": 1, "dim": 3},
        "one row": {"height": 1, "width": 19},
        "a block of channels": {"height": 5, "width": 9, "dim": 64},
        "larger than a block": {"height": 13, "width": 31, "dim": 150},
        "many channels": {"batch": 1, "height": 3, "width": 3, "dim": 4096},
    },
    "downsampling": {
        "plain": {},
        "one token": {"batch": 1, "dim": 1, "height": 1, "width": 1, "hidden": 1, "outputs": 1},
        "one row": {"height": 1, "width": 19},
        "one column": {"height": 12, "width": 1},
        "odd sizes": {"height": 5, "width": 9, "hidden": 32},
        "channels beyond a vector": {"height": 3, "width": 4, "dim": 35, "hidden": 37, "outputs": 70},
        "larger than a tile": {"batch": 1, "height": 19, "width": 22, "hidden": 150},
        "several parts": {"batch": 3, "height": 40, "width": 41, "hidden": 330},
    },
    "mlp": {
        "plain": {},
        "one token": {"batch": 1, "dim": 1, "hidden": 1, "outputs": 1},
        "channels beyond a vector": {"dim": 33, "hidden": 70, "outputs": 37},
        "larger than a tile": {"batch": 2600, "dim": 8, "hidden": 16},
        "deep": {"batch": 300, "dim": 9, "hidden": 530},
    },
    "spatial_mixer": {
        "plain": {},
        "one token": {"batch": 1, "dim": 3, "height": 1, "width": 1},
        "one row": {"height": 1, "width": 19},
        "one column": {"height": 12, "width": 1},
        "channels beyond a vector": {"height": 3, "width": 4, "dim": 37, "rank": 19},
        "larger than a block": {"height": 13, "width": 31, "dim": 18, "batch": 1},
        "kernels of 5": {"dilations": (1, 2), "size": 5},
        "merged taps": {"merged": True},
    },
}

# Batch sizes in Triton's interpreter, which takes up to seconds per image. On GPUs, all cases are run.
INTERPRETED_CASES = {
    "all options": 2,
    "states": 1,
    "one channel, one state": 1,
    "matrices of different groups": 1,
    "huge steps": 1,
    "one row": 2,
    "rows beyond a tile": 1,
    "many channels": 1,
    "smaller than the reach": 1,
    "one dilation": 1,
    "silu": 1,
    "half of a map": 1,
    "channels of a map": 2,
}


@all_backends
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_values_and_gradients(backend: torch.device, name: str, case: str, request: pytest.FixtureRequest) -> None:
    options = CASES[name][case]
    if interpreted(request):
        if case not in INTERPRETED_CASES:
            pytest.skip("the interpreter is slow: only some cases")
        options = options | {"batch": INTERPRETED_CASES[case]}
    assert_matches_reference(*OPERATORS[name](**options), backend)


@all_backends
@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(backend: torch.device, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if interpreted(request) and dtype == torch.float16:
        pytest.skip("the interpreter is slow: one dtype")
    batch = 1 if interpreted(request) else 2
    image = {"batch": batch, "height": 3, "width": 4} if interpreted(request) else {}
    for options in ("C D z bias softplus", "bias softplus"):
        assert_matches_reference(*scan_case(batch, options=options), backend, dtype)
    assert_matches_reference(*fusion_case(**image), backend, dtype)
    # In the model, outputs are 27 times as large as states; they stay in float32.
    for out_dtype in (None, torch.float32):
        assert_matches_reference(*core_case(**image, out_dtype=out_dtype), backend, dtype)

    part = image | {"dim": 8, "margins": (8, 8)}
    for epilogue in ("none", "silu", "residual"):
        assert_matches_reference(*conv_case(**part, epilogue=epilogue), backend, dtype)
    for y in ("y", "single y"):
        assert_matches_reference(*norm_case(**part, y=y), backend, dtype)
    assert_matches_reference(*layer_norm_case(**image, dim=8), backend, dtype)
    if not interpreted(request):  # it truncates where GPUs round: too coarse for several operators in sequence
        sampled = downsampling_case(batch=40, height=8, width=9, hidden=40)  # in several parts
        for operator in (mixer_case(), mlp_case(2600), sampled):
            assert_matches_reference(*operator, backend, dtype, rounds_within=True)


@compiled_backends
@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_weights_of_half_precision(backend: torch.device, dtype: torch.dtype) -> None:
    for function, tensors in (conv_case(), norm_case(), layer_norm_case(), mixer_case(), mixer_case(merged=True)):
        rounded = {name: t.to(backend, dtype) for name, t in tensors.items()}
        found = results(function, rounded)
        expected = results(function, {name: t if name in ACTIVATIONS else t.float() for name, t in rounded.items()})
        assert torch.equal(found["output 0"], expected["output 0"])
        for name in tensors:
            grad, wanted = found[f"gradient of {name}"], expected[f"gradient of {name}"]
            assert grad.dtype == dtype
            assert error(grad, wanted.double().cpu()) <= HALF_TOLERANCE[dtype], name


@all_backends
def test_float16_beyond_its_range(backend: torch.device) -> None:
    function, tensors = core_case(out_dtype=torch.float32)
    tensors["u"] = tensors["u"] * 1e4
    tensors["projection"][..., -2:] *= 1e2
    rounded = {name: t.half() for name, t in tensors.items()}
    y = function(**{name: t.to(backend) for name, t in rounded.items()})[0]
    with use_backend("torch"):
        expected = function(**{name: t.double() for name, t in rounded.items()})[0]
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert error(y, expected) <= SINGLE_TOLERANCE["output"]


@all_backends
def test_mixed_dtypes_are_computed_in_float32(backend: torch.device) -> None:
    for make, name in ((scan_case, "delta"), (core_case, "u")):
        function, tensors = make(batch=1)
        tensors = {k: t.float().to(backend) for k, t in tensors.items()}
        tensors[name] = tensors[name].half()
        out = function(**tensors)[0]
        expected = function(**tensors | {name: tensors[name].float()})[0]
        assert out.dtype == tensors["u"].dtype
        assert torch.equal(out, expected.to(out.dtype))


@compiled_backends
def test_any_memory_layout(backend: torch.device) -> None:
    for function, tensors in (make() for make in OPERATORS.values()):
        tensors = {name: t.float().to(backend) for name, t in tensors.items()}
        expected = results(function, tensors)
        strided = {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in tensors.items()}
        assert any(not t.is_contiguous() for t in strided.values())
        sliced = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
        for variant in (strided, sliced):
            for name, value in results(function, variant).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@all_backends
def test_strides_of_single_columns_are_ignored(backend: torch.device, request: pytest.FixtureRequest) -> None:
    cases = [conv_case, norm_case] if interpreted(request) else [conv_case, norm_case, mixer_case]
    for function, tensors in (make(height=6, width=1) for make in cases):
        tensors = {name: t.float().to(backend) for name, t in tensors.items()}
        maps = {
            name: t.as_strided(t.shape, (*t.stride()[:2], 7, 1)) for name, t in tensors.items() if t.shape[2:3] == (1,)
        }
        assert all(t.is_contiguous() for t in maps.values())
        expected = results(function, tensors)
        assert all(torch.equal(value, expected[name]) for name, value in results(function, tensors | maps).items())


@with_reference
def test_an_empty_batch(backend: torch.device) -> None:
    for function, tensors in (make(batch=0) for make in OPERATORS.values()):
        found = results(function, {name: t.float().to(backend) for name, t in tensors.items()})
        assert found["output 0"].shape[0] == 0
        assert [found[f"gradient of {name}"].shape for name in tensors] == [t.shape for t in tensors.values()]
        assert all((grad == 0).all() for name, grad in found.items() if name.startswith("gradient"))


@with_reference
def test_one_underflowing_decay_forgets_the_past(backend: torch.device) -> None:
    _, tensors = scan_case(options="")
    tensors = {name: t.float().to(backend) for name, t in tensors.items()}
    tensors["delta"][..., 17] = 1e4
    changed = tensors | {"u": tensors["u"].clone()}
    changed["u"][..., :17] *= -1e6
    states, changed_states = selective_scan(**tensors), selective_scan(**changed)
    assert torch.equal(states[..., 17:], changed_states[..., 17:])
    assert not torch.equal(states[..., :17], changed_states[..., :17])


@all_backends
def test_an_overflowing_rate_forgets_the_past(backend: torch.device) -> None:
    function, tensors = core_case(batch=1, height=2, width=2)
    tensors = {name: t.float() for name, t in tensors.items()}
    tensors["A_log"][1] = 100.0
    with use_backend("torch"):
        (expected,) = function(**tensors)
    (found,) = function(**{name: t.to(backend) for name, t in tensors.items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@compiled_backends
def test_results_do_not_change_from_run_to_run(backend: torch.device) -> None:
    for function, tensors in (make() for make in OPERATORS.values()):
        tensors = {name: t.float().to(backend) for name, t in tensors.items()}
        first, second = results(function, tensors), results(function, tensors)
        assert all(torch.equal(first[name], second[name]) for name in first)


# --- in float64, by finite differences


@pytest.mark.parametrize(
    "operator",
    [
        scan_case(1, 2, 5, 2, 1),
        fusion_case(1, 2, 3, 2),
        core_case(1, 2, 3, 2, 2),
        conv_case(1, 2, 3, 2, margins=(2, 0)),
        conv_case(1, 2, 3, 2, epilogue="residual"),
        norm_case(1, 2, 3, 3, margins=(3, 0)),
        layer_norm_case(1, 2, 3, 3),
        downsampling_case(1, 3, 4),
        mlp_case(3),
        mixer_case(1, 2, 3, 3, 2),
        mixer_case(1, 2, 3, 3, 2, merged=True),
    ],
)
@on(("cpu", "cpu"))
def test_gradcheck(backend: torch.device, operator: Case) -> None:
    function, tensors = operator
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values()]
    flat = lambda *values: function(**dict(zip(names, values, strict=True)))  # noqa: E731
    others = dict.fromkeys(("check_forward_ad", "check_batched_grad", "check_batched_forward_grad"), True)
    assert torch.autograd.gradcheck(flat, leaves, **others)
    assert torch.autograd.gradgradcheck(flat, leaves, fast_mode=True)


@on(("cpu", "cpu"))
def test_gradients_with_a_graph_of_arguments_that_depend_on_each_other(backend: torch.device) -> None:
    """As with tied weights: an argument is given twice, or computed from another."""
    leaves = [normals()(*shape).requires_grad_() for shape in ((1, 2, 3, 4), (4,))]
    x, weight = leaves
    y = layer_norm(x, weight, weight)
    loss = gated_norm(y, y.sin(), weight, 2 * weight).square().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, create_graph=True), expected)


# --- the test of mamba_ssm for its operator: its random inputs, options, lengths and tolerances

MAMBA_TOLERANCES = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


@all_backends
@pytest.mark.parametrize("dtype", MAMBA_TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
def test_scan_with_the_test_of_mamba_ssm(
    backend: torch.device, dtype: torch.dtype, length: int, request: pytest.FixtureRequest
) -> None:
    if interpreted(request) and (length, dtype) != (128, torch.float16):
        pytest.skip("the interpreter is slow: only short sequences of one dtype")
    g = generator()
    batch, dim, n = 2, 4, 8
    combinations = list(itertools.product([False, True], repeat=4))  # has_z, has_D, has_delta_bias, variable B and C
    for index, (has_z, has_D, has_bias, variable) in enumerate(
        combinations[-1:] if interpreted(request) else combinations
    ):
        groups = 1 + index % 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        weights = {"A": -0.5 * torch.rand(dim, n, generator=g)}
        tokens = {"u": normal(batch, dim, length), "delta": 0.5 * torch.rand(batch, dim, length, generator=g)}
        matrices = {"B": normal(batch, groups, n, length), "C": normal(batch, groups, n, length)}
        if variable:
            tokens |= matrices
        else:
            weights |= {"B": normal(dim, n), "C": normal(dim, n)}
        weights |= {"D": normal(dim)} if has_D else {}
        weights |= {"delta_bias": 0.5 * torch.rand(dim, generator=g)} if has_bias else {}
        tokens |= {"z": normal(batch, dim, length)} if has_z else {}
        tensors = {name: t.to(dtype) for name, t in tokens.items()} | weights

        def function(**kw: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan(**kw, delta_softplus=True, return_last_state=True)

        actual = results(function, {name: t.to(backend) for name, t in tensors.items()})
        with use_backend("torch"):
            expected = results(function, {name: t.double() for name, t in tensors.items()})
        rtol, atol = MAMBA_TOLERANCES[dtype]
        weight_rtol = max(1e-3, rtol) if has_z else 1e-3
        tolerances = {
            "gradient of u": (rtol * 2, atol * 2),
            "gradient of delta": (rtol * 5, atol * 10),
            "gradient of A": (weight_rtol, 5e-3),
            "gradient of D": (weight_rtol, 1e-3),
            "gradient of delta_bias": (weight_rtol, 1e-3),
        }
        for name, value in actual.items():
            tolerance = dict(zip(("rtol", "atol"), tolerances.get(name, (rtol, atol)), strict=True))
            torch.testing.assert_close(
                value.double().cpu(), expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


# --- PyTorch's tools


def operator_call(name: str, device: torch.device) -> tuple[Operator, tuple[Any, ...]]:
    """The operator that a public function calls, and its arguments; the tensors require gradients."""
    function, tensors = OPERATORS[name]()
    calls: list[tuple[Operator, tuple[Any, ...]]] = []
    call = Operator.__call__

    def record(self: Operator, *arguments: Any) -> Any:
        calls.append((self, arguments))
        return call(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operator, "__call__", record)
        function(**{k: t.float().to(device).requires_grad_() for k, t in tensors.items()})
    ((operator, arguments),) = calls
    assert operator.name == name
    return operator, tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)


@compiled_backends
@pytest.mark.parametrize("name", ["spatial_mixer", "mlp"])
def test_what_was_not_kept_is_computed_again(backend: torch.device, name: str) -> None:
    operator, (*arguments, keep) = operator_call(name, backend)
    assert keep is True
    expected, actual = (
        torch.autograd.grad(
            operator.operator(*arguments, keep)[0].sum(), [x for x in arguments if isinstance(x, Tensor)]
        )
        for keep in (True, False)
    )
    assert all(map(torch.equal, actual, expected))


@compiled_backends
def test_an_mlp_is_traced_with_and_without_gradients(backend: torch.device) -> None:
    _, (*tensors, _) = operator_call("mlp", backend)
    traced = torch.jit.trace(mlp, tuple(tensors))  # which compares this trace with one without gradients
    assert torch.equal(traced(*tensors), mlp(*tensors))


@compiled_backends
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(backend: torch.device, name: str) -> None:
    operator, arguments = operator_call(name, backend)
    opcheck(operator.operator, arguments)


@compiled_backends
@pytest.mark.parametrize("name", OPERATORS)
def test_backward_operators_pass_opcheck(backend: torch.device, name: str) -> None:
    operator, arguments = operator_call(name, backend)
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    outputs = operator.operator(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads, kept = outputs[: operator.num_differentiable], outputs[operator.num_differentiable :]
    tensors, others = arguments[: operator.num_tensors], arguments[operator.num_tensors :]
    backward = getattr(torch.ops.spatial_mamba, f"{name}_backward").default
    opcheck(backward, (*grads, *tensors, *kept, *others), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_run_without_any_native_code(name: str) -> None:
    """A graph recorded with a native backend still runs and trains without one."""
    with use_backend("torch"):
        operator, arguments = operator_call(name, torch.device("cpu"))
        opcheck(operator.operator, arguments)


def test_an_operator_without_gradients_says_so() -> None:
    x, packed = torch.ones(2, 8, requires_grad=True), torch.zeros(1, 8, 64)
    out = torch.ops.spatial_mamba.packed_linear(x, packed, None, None, None, None, 64, 1e-5, False)
    with pytest.raises(RuntimeError, match="packed_linear has no gradients"):
        out.sum().backward()


@on(("cpu", "cpu"), ("torch", "cpu"))
@pytest.mark.parametrize("length", [1, 5])
def test_absent_tensors_and_single_tokens_share_no_memory(backend: torch.device, length: int) -> None:
    """``torch.library`` refuses operators whose outputs do."""
    tensors = {k: t.float().requires_grad_() for k, t in scan_case(length=length, options="")[1].items()}
    out, last_state = torch.ops.spatial_mamba.selective_scan(*tensors.values(), None, None, None, None, False)
    grads = torch.autograd.grad(out.sum() + last_state.sum(), list(tensors.values()))
    assert [grad.shape for grad in grads] == [t.shape for t in tensors.values()]


class Wrapped(nn.Module):
    """A module around an operator, with some arithmetic before and after it; its inputs are the activations."""

    def __init__(self, function: Callable[..., tuple[Tensor]], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.inputs = [name for name in tensors if name in ACTIVATIONS]
        self.names = [name for name in tensors if name not in ACTIVATIONS]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(tensors[name]))

    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        weights = {name: getattr(self, name) for name in self.names}
        return self.function(**dict(zip(self.inputs, (2 * first, *rest), strict=True)), **weights)[0].sin()


WRAPPED = {
    "core": core_case(),
    "conv": conv_case(),
    "conv of a half": conv_case(margins=(5, 0)),
    "norm": norm_case(),
    "layer norm": layer_norm_case(),
    "norm by a half": norm_case(margins=(5, 0)),
    "downsampling": downsampling_case(),
    "mlp": mlp_case(),
    "mixer": mixer_case(),
    "mixer, merged": mixer_case(merged=True),
}


@compiled_backends
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_compile_export_checkpoint_and_autocast(backend: torch.device, wrapped: str) -> None:
    function, tensors = WRAPPED[wrapped]
    tensors = {k: t.float().to(backend) for k, t in tensors.items()}
    module = Wrapped(function, tensors)
    inputs = tuple(tensors[name].detach().requires_grad_() for name in module.inputs)

    def run(function: Callable[..., Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        y = function(*inputs)
        return y, *torch.autograd.grad(y.sum(), [*inputs, *module.parameters()], create_graph=create_graph)

    expected = run(module)
    torch.compiler.reset()  # each case compiles the same function, and their number is limited
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    checkpointed = lambda *args: checkpoint(module, *args, use_reentrant=False)  # noqa: E731
    for variant in (compiled, checkpointed):
        for actual, wanted in zip(run(variant), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    exported = torch.export.export(module, inputs).module()
    torch.testing.assert_close(exported(*inputs), expected[0])
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        found, with_graph = run(module), run(module, create_graph=True)
    # Where PyTorch serves, its backward pass computes matrix products in bfloat16 within autocast.
    by_pytorch = wrapped in ("downsampling", "mlp") and backends.reference_serves(inputs[0], wrapped)
    compared = 1 if by_pytorch and backend.type == "cuda" else len(expected)
    assert all(map(torch.equal, found[:compared], expected[:compared]))
    for actual, wanted in zip(with_graph[:compared], expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=5e-3, atol=5e-3)  # GPUs may round to TF32


@compiled_backends
def test_flops_are_counted(backend: torch.device) -> None:
    batch, height, width, dim, rank, taps = 2, 6, 7, 5, 3, 25
    elements = batch * height * width * dim
    _, scan = scan_case()
    for name, expected in (
        ("selective_scan", 7 * scan["u"].numel() * scan["A"].shape[1]),
        ("state_fusion", 2 * elements * taps),
        ("structure_aware_scan", elements * (2 * rank + 7 + 2 * taps)),
        ("depthwise_conv", elements * 2 * 9),
        ("gated_norm", 0),
        ("layer_norm", 0),
        ("downsampling", 2 * batch * (height * width * 4 * dim + 3 * 4 * dim * (9 + 3))),
        ("mlp", 2 * 9 * (5 * 7 + 7 * 6)),
        ("spatial_mixer", elements * (2 * 9 + 2 * (rank + 2) + 2 * rank + 7 + 2 * taps)),
    ):
        operator, arguments = operator_call(name, backend)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            operator.operator(*arguments)
        assert counter.get_total_flops() == expected


# --- the mixer, and the backends of its parts


@compiled_backends
@pytest.mark.parametrize("case", [mixer_case(), layer_norm_case()], ids=["mixer", "norm"])
def test_half_precision_under_autocast(backend: torch.device, case: Case) -> None:
    """As in a model: activations are bfloat16, and weights are float32."""
    function, tensors = case
    dtypes = dict.fromkeys(ACTIVATIONS, torch.bfloat16)
    tensors = {name: t.to(backend, dtypes.get(name, torch.float32)) for name, t in tensors.items()}
    expected = results(function, tensors)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        found = results(function, tensors)
    assert found["output 0"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@compiled_backends
def test_mixer_saves_only_what_it_states(backend: torch.device) -> None:
    function, tensors = mixer_case(batch=2, height=6, width=7, dim=8, merged=True)
    leaves = {name: t.float().to(backend).requires_grad_() for name, t in tensors.items()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(**leaves)
    tokens = 2 * 6 * 7
    weights = 4 * sum(t.numel() for name, t in tensors.items() if name != "xz")
    assert sum(kept.values()) == weights + 4 * (tokens * (2 * 8 + 8) + 2 * 6 * 8)  # xz, y, row states


@compiled_backends
def test_mixer_copies_no_map(backend: torch.device) -> None:
    function, tensors = mixer_case(merged=True)
    leaves = {name: t.float().to(backend).requires_grad_() for name, t in tensors.items()}
    grad_out = torch.ones(*leaves["xz"].shape[:3], 5, device=backend)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        torch.autograd.grad(function(**leaves), list(leaves.values()), grad_out)
    names = [event.name for event in profile.events()]
    assert {"spatial_mamba::spatial_mixer", "spatial_mamba::spatial_mixer_backward"} <= set(names)
    copied = [math.prod(e.input_shapes[0]) for e in profile.events() if e.name in ("aten::copy_", "aten::cat")]
    assert max(copied, default=0) < grad_out.numel()


def test_backend_that_serves_an_operator_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_missing", {"cpu": "not built", "cuda": None, "triton": None, "torch": None})
    monkeypatch.setattr(backends, "_forced", None)

    def serving(operator: str, dtype: torch.dtype = torch.float32) -> str:
        return backends.serving("cuda", dtype, None, operator)

    native = ("selective_scan", "state_fusion", "structure_aware_scan", "depthwise_conv", "gated_norm", "layer_norm")
    assert [serving(name) for name in native] == ["cuda"] * 6
    assert [serving(name, torch.float64) for name in native] == ["torch"] * 6
    for name in ("cuda", "triton", "torch"):
        with use_backend(name):
            assert [serving(operator) for operator in native] == [name] * 6
            others = [serving(operator) for operator in ("downsampling", "mlp")]
            assert others == ["cuda" if name == "cuda" else "torch"] * 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@on(("cpu", "cpu"))
def test_new_numbers_of_tokens_need_no_new_machine_code(backend: torch.device) -> None:
    """oneDNN generates code for each size of a product, and PyTorch keeps it."""

    def mix(widths: range) -> None:
        for width in widths:
            function, tensors = mixer_case(1, 3, width, 16, 2)
            function(**{name: t.float().to(backend) for name, t in tensors.items()})

    mix(range(8, 200, 7))
    before = executable_memory()
    mix(range(9, 200, 7))
    assert executable_memory() - before < 2**20


def executable_memory() -> int:
    """Bytes of machine code in this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if "x" in line[1]]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)
