"""Every back end against the definition in float64: values, gradients, dtypes, layouts, and PyTorch's own machinery."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba.kernels import backends, selective_scan, state_fusion, structure_aware_scan, use_backend
from spatial_mamba.kernels.taps import merge_taps, tap_offsets

gpu = pytest.mark.gpu
COMPILED = [
    ("cpu", "cpu"),
    pytest.param(("triton", "cuda"), marks=gpu),
    pytest.param(("cuda", "cuda"), marks=gpu),
]
compiled_backends = pytest.mark.parametrize("backend", COMPILED, ids="-on-".join, indirect=True)
all_backends = pytest.mark.parametrize("backend", [*COMPILED, ("triton", "cpu")], ids="-on-".join, indirect=True)
half_types = (torch.bfloat16, torch.float16)
SINGLE_TOLERANCE = {"output": 1e-5, "gradient": 3e-5}  # of the largest magnitude
HALF_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Forces a back end, and gives the device on which it runs."""
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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_case(
    batch: int = 2,
    dim: int = 6,
    length: int = 70,
    n: int = 3,
    groups: int = 2,
    options: str = "C D z bias softplus",
    scale: float = 1.0,
    matrices: str = "grouped",
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A selective scan with ``options``: the function, and its tensors in float64."""
    g = generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shapes = {"grouped": (batch, groups, n, length), "shared": (batch, n, length), "constant": (dim, n)}
    B, C = (shapes[layout] for layout in (matrices.split(", ") * 2)[:2])
    tensors = {
        "u": normal(batch, dim, length),
        "delta": scale * (0.1 + torch.rand(batch, dim, length, generator=g, dtype=torch.float64)),
        "A": -0.3 - torch.rand(dim, n, generator=g, dtype=torch.float64),
        "B": normal(*B),
    }
    optional = {"C": normal(*C), "D": normal(dim), "z": normal(batch, dim, length), "delta_bias": normal(dim)}
    tensors |= {name: value for name, value in optional.items() if name.removeprefix("delta_") in options.split()}
    return lambda **kw: selective_scan(**kw, delta_softplus="softplus" in options, return_last_state=True), tensors


def fusion_case(
    batch: int = 2, dim: int = 5, height: int = 6, width: int = 7, dilations: tuple[int, ...] = (1, 3, 5), size: int = 3
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """State fusion: the function, and its tensors in float64."""
    g = generator()
    tensors = {"h": torch.randn(batch, dim, height, width, generator=g, dtype=torch.float64)} | fusion_weights(
        g, dim, dilations, size
    )

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
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The scan with state fusion, steps around softplus(``step``): the function, and its tensors in float64."""
    g = generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {
        "u": normal(batch, height, width, dim),
        "projection": normal(batch, height, width, rank + 2),
        "step_weight": 0.3 * normal(dim, rank),
        "step_bias": 0.5 * normal(dim) + step,
        "A_log": 0.5 * normal(dim),
        "D": normal(dim),
    } | fusion_weights(g, dim, dilations, size)

    def function(alpha: Tensor, **kw: Tensor) -> tuple[Tensor]:
        kernels = [kw.pop(f"kernel_{k}") for k in range(len(dilations))]
        return (structure_aware_scan(**kw, kernels=kernels, alpha=alpha, dilations=dilations, out_dtype=out_dtype),)

    return function, tensors


def fusion_weights(g: torch.Generator, dim: int, dilations: tuple[int, ...], size: int) -> dict[str, Tensor]:
    kernels = {
        f"kernel_{k}": torch.randn(dim, 1, size, size, generator=g, dtype=torch.float64) for k in range(len(dilations))
    }
    return kernels | {"alpha": torch.randn(len(dilations), generator=g, dtype=torch.float64)}


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
    # What float32 cannot tell from 0 is 0: gradients of decays that underflowed.
    difference = (actual.double().cpu() - expected).abs().max().item()
    return difference / largest if largest > 1e-30 else difference


def assert_matches_definition(
    function: Callable[..., Any], tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Values and gradients are those of the definition in float64, as near as ``dtype`` allows.

    Activations are given in ``dtype``, weights in float32. At extreme steps float32 itself loses digits: there, the
    back end may be off by as much as the definition in float32, four times over.
    """
    activations = {"u", "delta", "B", "C", "z", "h", "projection"}
    rounded = {name: t.to(dtype if name in activations else torch.float32) for name, t in tensors.items()}
    actual = results(function, {name: t.to(device) for name, t in rounded.items()})
    with use_backend("torch"):
        expected = results(function, {name: t.double() for name, t in rounded.items()})
        single = results(function, {name: t.float() for name, t in rounded.items()})
    for name, value in actual.items():
        assert value.isfinite().all(), name
        tolerance = max(SINGLE_TOLERANCE[name.split()[0]], 4 * error(single[name], expected[name]))
        if value.dtype in half_types:
            tolerance = HALF_TOLERANCE[value.dtype]
        assert error(value, expected[name]) <= tolerance, name


SCANS: dict[str, dict[str, Any]] = {
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
}
FUSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"batch": 1, "dim": 1, "height": 1, "width": 1},
    "one row": {"height": 1, "width": 19},
    "one column": {"height": 12, "width": 1},
    "smaller than the reach": {"height": 3, "width": 4, "dim": 17},
    "larger than a block": {"height": 13, "width": 31, "dim": 18, "batch": 1},
    "one dilation": {"dilations": (2,)},
    "kernels of 5": {"dilations": (1, 2), "size": 5},
}
CORES: dict[str, dict[str, Any]] = FUSIONS | {
    "rank beyond a vector": {"rank": 19},
    "steps near 0": {"step": -60.0},
    "small steps": {"step": -12.0},
    "huge steps": {"step": 60.0},
}

# Each takes seconds in Triton's interpreter. On GPUs all are run.
INTERPRETED = {
    "all options",
    "states",
    "one channel, one state",
    "matrices of different groups",
    "huge steps",
    "one row",
    "smaller than the reach",
    "one dilation",
}


@pytest.fixture
def case(request: pytest.FixtureRequest, backend: torch.device) -> str:
    """Name of a case; in the interpreter only of a few."""
    if interpreted(request) and request.param not in INTERPRETED:
        pytest.skip("the interpreter is slow: only some cases")
    return request.param


@all_backends
@pytest.mark.parametrize("case", SCANS, indirect=True)
def test_scan(backend: torch.device, case: str) -> None:
    assert_matches_definition(*scan_case(**SCANS[case]), backend)


@all_backends
@pytest.mark.parametrize("case", FUSIONS, indirect=True)
def test_fusion(backend: torch.device, case: str) -> None:
    assert_matches_definition(*fusion_case(**FUSIONS[case]), backend)


@all_backends
@pytest.mark.parametrize("case", CORES, indirect=True)
def test_core(backend: torch.device, case: str) -> None:
    assert_matches_definition(*core_case(**CORES[case]), backend)


@all_backends
@pytest.mark.parametrize("dtype", half_types, ids=str)
def test_half_precision(backend: torch.device, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if interpreted(request) and dtype == torch.float16:
        pytest.skip("the interpreter is slow: one dtype")
    for function, tensors in (scan_case(), scan_case(options="bias softplus"), fusion_case(), core_case()):
        assert_matches_definition(function, tensors, backend, dtype)
    # The outputs of the model are 27 times as large as states: kept in float32.
    assert_matches_definition(*core_case(out_dtype=torch.float32), backend, dtype)


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
        function, tensors = make()
        tensors = {k: t.float().to(backend) for k, t in tensors.items()}
        tensors[name] = tensors[name].half()
        out = function(**tensors)[0]
        expected = function(**tensors | {name: tensors[name].float()})[0]
        assert out.dtype == tensors["u"].dtype
        assert torch.equal(out, expected.to(out.dtype))


@compiled_backends
def test_any_memory_layout(backend: torch.device) -> None:
    for function, tensors in (scan_case(), fusion_case(), core_case()):
        tensors = {name: t.float().to(backend) for name, t in tensors.items()}
        expected = results(function, tensors)
        strided = {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in tensors.items()}
        assert any(not t.is_contiguous() for t in strided.values())
        sliced = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
        for variant in (strided, sliced):
            for name, value in results(function, variant).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@all_backends
def test_an_empty_batch(backend: torch.device) -> None:
    for function, tensors in (scan_case(batch=0), fusion_case(batch=0), core_case(batch=0)):
        found = results(function, {name: t.float().to(backend) for name, t in tensors.items()})
        assert found["output 0"].shape[0] == 0
        assert [found[f"gradient of {name}"].shape for name in tensors] == [t.shape for t in tensors.values()]
        assert all((grad == 0).all() for name, grad in found.items() if name.startswith("gradient"))


@all_backends
def test_one_underflowing_decay_forgets_the_past(backend: torch.device) -> None:
    _, tensors = scan_case(options="")
    tensors = {name: t.float().to(backend) for name, t in tensors.items()}
    tensors["delta"][..., 17] = 1e4
    changed = tensors | {"u": tensors["u"].clone()}
    changed["u"][..., :17] *= -1e6
    states, changed_states = selective_scan(**tensors), selective_scan(**changed)
    assert torch.equal(states[..., 17:], changed_states[..., 17:])
    assert not torch.equal(states[..., :17], changed_states[..., :17])


@compiled_backends
def test_results_do_not_change_from_run_to_run(backend: torch.device) -> None:
    for function, tensors in (scan_case(), fusion_case(), core_case()):
        tensors = {name: t.float().to(backend) for name, t in tensors.items()}
        first, second = results(function, tensors), results(function, tensors)
        assert all(torch.equal(first[name], second[name]) for name in first)


# --- in float64, by finite differences


@pytest.mark.parametrize("operator", [scan_case(1, 2, 5, 2, 1), fusion_case(1, 2, 3, 2), core_case(1, 2, 3, 2, 2)])
@pytest.mark.parametrize("backend", [("cpu", "cpu")], ids="-on-".join, indirect=True)
def test_gradcheck(backend: torch.device, operator: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = operator
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values()]
    flat = lambda *values: function(**dict(zip(names, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(flat, leaves)
    assert torch.autograd.gradgradcheck(flat, leaves, fast_mode=True)


# --- mamba_ssm's own way of testing its operator: its random inputs, options, lengths and tolerances

MAMBA_TOLERANCES = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


@all_backends
@pytest.mark.parametrize("dtype", MAMBA_TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
def test_scan_as_mamba_ssm_tests_it(
    backend: torch.device, dtype: torch.dtype, length: int, request: pytest.FixtureRequest
) -> None:
    if interpreted(request) and length > 128:
        pytest.skip("the interpreter is slow: only short sequences")
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


# --- PyTorch's machinery

SCAN_OPERATORS = ("selective_scan", "state_fusion", "structure_aware_scan")


def operator_arguments(name: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of ``torch.ops.spatial_mamba.<name>`` that require gradients."""
    make = {"selective_scan": scan_case, "state_fusion": fusion_case, "structure_aware_scan": core_case}[name]
    tensors = {k: t.float().to(device) for k, t in make()[1].items()}
    if name == "selective_scan":
        arguments = (*(tensors[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), True)
    else:
        kernels = [tensors[f"kernel_{k}"] for k in range(3)]
        fusion = (merge_taps(kernels, tensors["alpha"], (1, 3, 5)), tap_offsets((3, 3, 3), (1, 3, 5)))
        if name == "state_fusion":
            arguments = (tensors["h"].permute(0, 2, 3, 1).contiguous(), *fusion)
        else:
            names = ("u", "projection", "step_weight", "step_bias", "A_log", "D")
            arguments = (*(tensors[k] for k in names), *fusion, torch.float32)
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)


@compiled_backends
@pytest.mark.parametrize("name", SCAN_OPERATORS)
def test_operators_pass_opcheck(backend: torch.device, name: str) -> None:
    operator = getattr(torch.ops.spatial_mamba, name).default
    opcheck(operator, operator_arguments(name, backend))


@compiled_backends
@pytest.mark.parametrize("name", SCAN_OPERATORS)
def test_backward_operators_pass_opcheck(backend: torch.device, name: str) -> None:
    operator = getattr(torch.ops.spatial_mamba, f"{name}_backward").default
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in operator_arguments(name, backend)]
    outputs = getattr(torch.ops.spatial_mamba, name)(*arguments)
    if name == "selective_scan":
        arguments = [*outputs, *arguments]
    elif name == "state_fusion":
        arguments = [outputs, *arguments]
    else:
        y, row_states = outputs
        arguments = [y, *arguments[:7], row_states, arguments[7]]
    opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", SCAN_OPERATORS)
def test_operators_run_without_any_native_code(name: str) -> None:
    """A graph recorded where a native back end was still runs, and trains, where none is."""
    with use_backend("torch"):
        opcheck(getattr(torch.ops.spatial_mamba, name).default, operator_arguments(name, torch.device("cpu")))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_absent_tensors_and_single_tokens_share_no_memory(name: str, length: int) -> None:
    """``torch.library`` refuses operators whose outputs do."""
    if reason := backends.why_not(name, "cpu", torch.float32):
        pytest.skip(reason)
    tensors = {k: t.float().requires_grad_() for k, t in scan_case(length=length, options="")[1].items()}
    with use_backend(name):
        out, last_state = torch.ops.spatial_mamba.selective_scan(*tensors.values(), None, None, None, None, False)
        grads = torch.autograd.grad(out.sum() + last_state.sum(), list(tensors.values()))
    assert [grad.shape for grad in grads] == [t.shape for t in tensors.values()]


class Core(nn.Module):
    """A module around the core, with some arithmetic before and after it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = core_case()[0]
        self.names = [name for name in tensors if name not in ("u", "projection")]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(tensors[name]))

    def forward(self, u: Tensor, projection: Tensor) -> Tensor:
        weights = {name: getattr(self, name) for name in self.names}
        return self.function(u=2 * u, projection=projection, **weights)[0].sin()


@compiled_backends
def test_compile_export_checkpoint_and_autocast(backend: torch.device) -> None:
    tensors = {k: t.float() for k, t in core_case()[1].items()}
    module = Core(tensors).to(backend)
    u = tensors["u"].to(backend).requires_grad_()
    inputs = (u, tensors["projection"].to(backend))

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = function(*inputs)
        return y, *torch.autograd.grad(y.sum(), [u, *module.parameters()])

    expected = run(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    checkpointed = lambda *args: checkpoint(module, *args, use_reentrant=False)  # noqa: E731
    for variant in (compiled, checkpointed):
        for actual, wanted in zip(run(variant), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    exported = torch.export.export(module, inputs).module()
    torch.testing.assert_close(exported(*inputs), expected[0])
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        for actual, wanted in zip(run(module), expected, strict=True):
            assert torch.equal(actual, wanted)


@all_backends
def test_flops_are_counted(backend: torch.device) -> None:
    batch, height, width, dim, rank, taps = 2, 6, 7, 5, 3, 25
    elements = batch * height * width * dim
    _, scan = scan_case()
    for name, expected in (
        ("selective_scan", 7 * scan["u"].numel() * scan["A"].shape[1]),
        ("state_fusion", 2 * elements * taps),
        ("structure_aware_scan", elements * (2 * rank + 7 + 2 * taps)),
    ):
        arguments = operator_arguments(name, backend)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(torch.ops.spatial_mamba, name)(*arguments)
        assert counter.get_total_flops() == expected


@pytest.mark.parametrize("name", ["nonsense", "CPU", ""])
def test_use_backend_refuses_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of cpu, cuda, triton, torch"), use_backend(name):
        pass


def test_a_forced_backend_that_cannot_serve_is_an_error() -> None:
    function, tensors = fusion_case()
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' is forced.* no kernels for cpu tensors"):
        function(**tensors)
