"""The definitions against slow, obvious references: forward, gradients, precision, cost and errors."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spatial_mamba.kernels import (
    depthwise_conv,
    gated_norm,
    selective_scan,
    spatial_mixer,
    state_fusion,
    structure_aware_scan,
    use_backend,
)
from spatial_mamba.kernels.recurrence import _operator, _scan_pairwise, linear_recurrence
from spatial_mamba.kernels.state_fusion import merge_taps, split_taps, tap_offsets

BATCH, DIM = 2, 4
SHORT, LONG = (1, 7), (64, 1000, 3136)
# A lies in [-1.5, -0.5]: at the huge scale every decay underflows to 0, in float64 too.
DELTA_SCALES = {"tiny": 1e-6, "normal": 1.0, "huge": 1e4}

all_state_sizes = pytest.mark.parametrize("n", [1, 4, 16])
all_groups = pytest.mark.parametrize("groups", [1, 2])
all_delta_scales = pytest.mark.parametrize("scale", DELTA_SCALES)
half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def definition() -> Iterator[None]:
    """What the backends are compared with elsewhere is what is tested here."""
    with use_backend("torch"):
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_inputs(n: int, length: int, groups: int = 1, scale: str = "normal", dim: int = DIM) -> dict[str, Tensor]:
    """float64 inputs whose values float32 holds exactly, so that rounding the inputs is no part of any error."""
    g = generator()
    inputs = {
        "u": torch.randn(BATCH, dim, length, generator=g),
        "delta": DELTA_SCALES[scale] * (0.5 + torch.rand(BATCH, dim, length, generator=g)),
        "A": -0.5 - torch.rand(dim, n, generator=g),
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
        # unbind, because the gradient of L separate indexings would cost L squared
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
@pytest.mark.parametrize("length", SHORT + LONG)
def test_scan_in_float32_matches_the_loop(n: int, groups: int, scale: str, length: int) -> None:
    inputs = scan_inputs(n, length, groups, scale)
    y = selective_scan(**{name: value.float() for name, value in inputs.items()})
    assert y.dtype == torch.float32
    assert_near(y, scan_loop(**inputs)[0], 1e-5)


@all_state_sizes
@all_groups
@all_delta_scales
@pytest.mark.parametrize("length", SHORT + LONG)
def test_scan_gradients_match_the_loop(n: int, groups: int, scale: str, length: int) -> None:
    # Compared relative to each gradient: at a tiny step that of A is some 1e-12 of the others.
    inputs = scan_inputs(n, length, groups, scale)
    assert_same_results(lambda **kw: (selective_scan(**kw),), lambda **kw: scan_loop(**kw)[:1], inputs, 1e-9)


@all_state_sizes
@all_groups
@all_delta_scales
@pytest.mark.parametrize("length", [1, 7, 64, 1000, 3136])
def test_scan_gradcheck(n: int, groups: int, scale: str, length: int) -> None:
    inputs = [value.requires_grad_() for value in scan_inputs(n, length, groups, scale, dim=2).values()]
    # At a tiny step the gradient of A is about 1e-11, which the default tolerance would not even see.
    # At a huge one differences are still exact: the scan is linear in every input but A, and no longer depends on A.
    atol = {"tiny": 1e-13, "normal": 1e-6, "huge": 1e-5}[scale]
    # Beyond a few tokens gradcheck compares along a random direction instead of entry by entry.
    assert gradcheck(selective_scan, inputs, atol=atol, fast_mode=scale != "tiny" or length > 7)


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


def test_one_underflowing_decay_forgets_the_past() -> None:
    inputs = scan_inputs(2, 40) | {"C": None}
    inputs["delta"][..., 17] = 1e4
    changed = inputs | {"u": inputs["u"].clone()}
    changed["u"][..., :17] *= -1e6
    states, changed_states = selective_scan(**inputs), selective_scan(**changed)
    assert torch.equal(states[..., 17:], changed_states[..., 17:])
    assert not torch.equal(states[..., :17], changed_states[..., :17])


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


@pytest.mark.parametrize("length", [1, 2, 7])
def test_linear_recurrence_gradgradcheck(length: int) -> None:
    g = generator()
    decays = torch.rand(2, length - 1, generator=g, dtype=torch.float64, requires_grad=length > 1)
    inputs = torch.randn(2, length, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(linear_recurrence, (decays, inputs))


class OperationCounter(TorchDispatchMode):
    """Counts the operations that run and the elements they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        self.elements += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def test_scan_work_is_linear_and_its_depth_logarithmic() -> None:
    counts = []
    for length in (1024, 2048, 4096):
        with OperationCounter() as count:
            _scan_pairwise(torch.rand(DIM, length - 1), torch.randn(DIM, length))
        counts.append(count)
    first, second, third = counts
    # Work of order L log L would grow by a factor of 2.2 at the first doubling.
    assert second.elements == pytest.approx(2 * first.elements, rel=0.02)
    assert third.elements == pytest.approx(2 * second.elements, rel=0.02)
    assert 0 < third.calls - second.calls == second.calls - first.calls < 30


@pytest.mark.parametrize("length", [1, 7])
def test_recurrence_is_a_whole_operator(length: int) -> None:
    """Schema, fake form (strides included), autograd and export agree with what the operator does."""
    decays = torch.rand(2, 3, length, generator=generator()).transpose(1, 2)[:, 1:].transpose(1, 2)
    inputs = torch.randn(2, length, 3, generator=generator()).transpose(1, 2)
    opcheck(_operator, (decays.requires_grad_(), inputs.requires_grad_()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(DIM, 5)}, "^u must be"),
        ({"u": torch.ones(BATCH, DIM, 0)}, "^u must be"),
        ({"delta": torch.ones(BATCH, DIM, 6)}, "^delta must be"),
        ({"A": torch.ones(DIM)}, "^A must be"),
        ({"A": torch.ones(DIM + 1, 3)}, "^A must be"),
        ({"B": torch.ones(DIM)}, "^B must be"),
        ({"B": torch.ones(DIM, 2)}, "^B must be"),
        ({"B": torch.ones(BATCH, 3, 6)}, "^B must be"),
        ({"B": torch.ones(BATCH, 3, 3, 5)}, "^B must be .* groups dividing 4"),
        ({"B": torch.ones(BATCH, 0, 3, 5)}, "^B must be"),
        ({"C": torch.ones(BATCH, 2, 2, 5)}, "^C must be"),
        ({"D": torch.ones(DIM, 1)}, "^D must be"),
        ({"z": torch.ones(BATCH, DIM, 1)}, "^z must be"),
        ({"delta_bias": torch.ones(1)}, "^delta_bias must be"),
        ({"C": None, "D": torch.ones(DIM)}, "^D and z .* pass C"),
        ({"C": None, "z": torch.ones(BATCH, DIM, 5)}, "^D and z .* pass C"),
    ],
)
def test_scan_refuses(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_inputs(3, 5) | change)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_scan_refuses_types_and_devices(name: str) -> None:
    inputs = scan_inputs(3, 5) | {"D": torch.ones(DIM), "z": torch.ones(BATCH, DIM, 5), "delta_bias": torch.ones(DIM)}
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=f"^{name} must be of a real floating-point type, got {dtype}"):
            selective_scan(**inputs | {name: inputs[name].to(dtype)})
    other = "delta" if name == "u" else name  # all have to be where u is
    with pytest.raises(ValueError, match=f"^{other} must be on the device of u"):
        selective_scan(**inputs | {name: inputs[name].to("meta")})


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


@pytest.mark.parametrize("height, width", [(1, 1), (2, 7), (5, 3), (8, 9)])
@pytest.mark.parametrize(("dilations", "size"), [((1, 3, 5), 3), ((1,), 3), ((2, 4), 3), ((1, 2), 5)])
def test_fusion_matches_gathering(height: int, width: int, dilations: tuple[int, ...], size: int) -> None:
    h, kernels, alpha = fusion_inputs(height, width, len(dilations), size)
    fused = state_fusion(h, kernels, alpha, dilations)
    assert fused.dtype == torch.float32
    assert_near(fused, fuse_by_gathering(h, kernels, alpha, dilations), 1e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 7)])
def test_fusion_gradcheck(height: int, width: int) -> None:
    h, kernels, alpha = fusion_inputs(height, width, 2)
    tensors = [t.double().requires_grad_() for t in (h, *kernels, alpha)]
    assert gradcheck(lambda h, k1, k2, alpha: state_fusion(h, (k1, k2), alpha, (1, 3)), tensors)


@pytest.mark.parametrize(
    "layout",
    [
        lambda h: h.contiguous(memory_format=torch.channels_last),
        lambda h: h.transpose(2, 3).contiguous().transpose(2, 3),
        lambda h: F.pad(h, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        lambda h: h[:1].expand_as(h),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded"],
)
def test_fusion_accepts_any_memory_layout(layout: Callable[[Tensor], Tensor]) -> None:
    h, kernels, alpha = fusion_inputs(6, 7)
    h = layout(h)
    assert not h.is_contiguous()
    assert_near(state_fusion(h, kernels, alpha), fuse_by_gathering(h, kernels, alpha, (1, 3, 5)), 1e-6)


@half_types
def test_fusion_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    h, kernels, alpha = fusion_inputs(6, 7)
    h, alpha, kernels = h.to(dtype), alpha.to(dtype), [k.to(dtype) for k in kernels]
    fused = state_fusion(h, kernels, alpha)
    assert fused.dtype == dtype
    assert torch.equal(fused, state_fusion(h.float(), [k.float() for k in kernels], alpha.float()).to(dtype))


def test_states_beyond_the_range_of_fp16_stay_finite_under_autocast() -> None:
    h = torch.full((1, DIM, 4, 4), 70000.0)
    kernels = [torch.ones(DIM, 1, 3, 3) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.float16):
        fused = state_fusion(h, kernels, torch.ones(3))
    assert fused.dtype == torch.float32
    assert_near(fused, 27 * h, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.ones(DIM, 4, 4)}, "^h must be"),
        ({"h": torch.ones(BATCH, DIM, 0, 4)}, "^h must be"),
        ({"kernels": [], "alpha": torch.ones(0), "dilations": ()}, "^kernels must hold at least one"),
        ({"kernels": [torch.ones(DIM, 1, 3, 3)]}, "1 kernels"),
        ({"alpha": torch.ones(2)}, r"alpha of \(2,\)"),
        ({"alpha": torch.ones(3, 1)}, r"alpha of \(3, 1\)"),
        ({"dilations": (1, 3)}, r"dilations \(1, 3\)"),
        ({"dilations": (1, 0, 5)}, r"dilations must be positive integers, got \(1, 0, 5\)"),
        ({"dilations": (1, 3.0, 5)}, r"dilations must be positive integers, got \(1, 3.0, 5\)"),
        ({"kernels": [torch.ones(DIM + 1, 1, 3, 3)] * 3}, r"fusion kernel must be .* got \(5, 1, 3, 3\)"),
        ({"kernels": [torch.ones(DIM, 1, 2, 2)] * 3}, r"fusion kernel must be .* odd k, got \(4, 1, 2, 2\)"),
        ({"kernels": [torch.ones(DIM, 1, 3, 5)] * 3}, r"fusion kernel must be .* got \(4, 1, 3, 5\)"),
        ({"kernels": [torch.ones(DIM, 3, 3)] * 3}, r"fusion kernel must be .* got \(4, 3, 3\)"),
    ],
)
def test_fusion_refuses(change: dict[str, Any], message: str) -> None:
    h, kernels, alpha = fusion_inputs(4, 4)
    with pytest.raises(ValueError, match=message):
        state_fusion(**dict(h=h, kernels=kernels, alpha=alpha, dilations=(1, 3, 5)) | change)


@pytest.mark.parametrize("name", ["h", "kernels[1]", "alpha"])
def test_fusion_refuses_types_and_devices(name: str) -> None:
    h, kernels, alpha = fusion_inputs(4, 4)

    def fuse_with(change: Callable[[Tensor], Tensor]) -> None:
        changed = {"h": h, "kernels[1]": kernels[1], "alpha": alpha}
        changed[name] = change(changed[name])
        state_fusion(changed["h"], [kernels[0], changed["kernels[1]"], kernels[2]], changed["alpha"])

    with pytest.raises(TypeError, match=f"^{re.escape(name)} must be of a real floating-point type, got torch.int64"):
        fuse_with(lambda tensor: tensor.long())
    with pytest.raises(ValueError, match=r"must be on the device of h"):
        fuse_with(lambda tensor: tensor.to("meta"))


def core_inputs(dim: int = DIM, rank: int = 3, height: int = 4, width: int = 5) -> dict[str, Any]:
    g = generator()
    return dict(
        u=torch.randn(BATCH, height, width, dim, generator=g),
        projection=torch.randn(BATCH, height, width, rank + 2, generator=g),
        step_weight=torch.randn(dim, rank, generator=g),
        step_bias=torch.randn(dim, generator=g),
        A_log=torch.randn(dim, generator=g),
        D=torch.randn(dim, generator=g),
        kernels=[torch.randn(dim, 1, 3, 3, generator=g) for _ in range(3)],
        alpha=torch.randn(3, generator=g),
    )


def test_core_is_scan_fusion_and_read_out() -> None:
    inputs = core_inputs()
    r, B, C = inputs["projection"].split([3, 1, 1], dim=-1)
    h, _ = scan_loop(
        inputs["u"].flatten(1, 2).mT.double(),
        (r @ inputs["step_weight"].T).flatten(1, 2).mT.double(),
        -inputs["A_log"].double().exp()[:, None],
        B.flatten(1, 2).mT.double(),
        delta_bias=inputs["step_bias"].double(),
        delta_softplus=True,
    )
    fused = fuse_by_gathering(h[:, :, 0].unflatten(-1, (4, 5)), inputs["kernels"], inputs["alpha"], (1, 3, 5))
    expected = C * fused.permute(0, 2, 3, 1) + inputs["D"] * inputs["u"]
    assert_near(structure_aware_scan(**inputs), expected, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(DIM, 4, 5)}, "^u must be"),
        ({"u": torch.ones(BATCH, 4, 0, DIM)}, "^u must be"),
        ({"projection": torch.ones(BATCH, 4, 5, 4)}, r"^projection must be .* = \(2, 4, 5, 5\) .* got \(2, 4, 5, 4\)"),
        ({"step_weight": torch.ones(DIM + 1, 3)}, "^step_weight must be"),
        ({"step_weight": torch.ones(DIM, 0)}, "^step_weight must be .* R >= 1"),
        ({"step_bias": torch.ones(DIM, 1)}, "^step_bias must be"),
        ({"A_log": torch.ones(DIM, 1)}, "^A_log must be"),
        ({"D": torch.ones(1)}, "^D must be"),
        ({"alpha": torch.ones(2)}, r"alpha of \(2,\)"),
        ({"dilations": (0, 1, 2)}, "^dilations must be"),
    ],
)
def test_core_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_aware_scan(**core_inputs() | change)


@pytest.mark.parametrize("name", ["u", "projection", "step_weight", "step_bias", "A_log", "D", "alpha"])
def test_core_refuses_types_and_devices(name: str) -> None:
    inputs = core_inputs()
    with pytest.raises(TypeError, match=f"^{name} must be of a real floating-point type, got torch.int64"):
        structure_aware_scan(**inputs | {name: inputs[name].long()})
    with pytest.raises(ValueError, match="must be on the device of u"):
        structure_aware_scan(**inputs | {name: inputs[name].to("meta")})


def test_core_refuses_an_output_dtype_without_fractions() -> None:
    with pytest.raises(TypeError, match=r"^out_dtype must be a floating-point type, got torch.int32"):
        structure_aware_scan(**core_inputs(), out_dtype=torch.int32)


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
        ({"x": torch.ones(DIM, 4, 5)}, "^x must be"),
        ({"x": torch.ones(BATCH, 4, 0, DIM)}, "^x must be"),
        ({"weight": torch.ones(DIM, 9)}, r"^weight must be .* = \(4, 1, 3, 3\), got \(4, 9\)"),
        ({"weight": torch.ones(DIM + 1, 1, 3, 3)}, "^weight must be"),
        ({"weight": torch.ones(DIM, 1, 5, 5)}, "^weight must be"),
        ({"bias": torch.ones(1)}, "^bias must be"),
        ({"epilogue": "relu"}, "^epilogue must be one of none, silu, residual, got 'relu'"),
    ],
)
def test_conv_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**conv_inputs() | change)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(DIM, 4, 5)}, "^y must be"),
        ({"y": torch.ones(BATCH, 0, 5, DIM)}, "^y must be"),
        ({"gate": torch.ones(BATCH, 4, 5, DIM + 1)}, r"^gate must be of the shape of y, \(2, 4, 5, 4\), got"),
        ({"weight": torch.ones(DIM, 1)}, "^weight must be"),
        ({"bias": torch.ones(1)}, "^bias must be"),
    ],
)
def test_norm_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_norm(**norm_inputs() | change)


def mixer_inputs(merged: bool = False) -> dict[str, Any]:
    core = core_inputs()
    del core["u"], core["projection"]
    g = generator(1)
    if merged:
        taps = merge_taps(core["kernels"], core["alpha"], (1, 3, 5))
        core |= dict(kernels=None, alpha=None, taps=taps)
    return core | dict(
        xz=torch.randn(BATCH, 4, 5, 2 * DIM, generator=g),
        conv_weight=torch.randn(DIM, 1, 3, 3, generator=g),
        conv_bias=torch.randn(DIM, generator=g),
        projection_weight=torch.randn(5, DIM, generator=g),
        norm_weight=torch.randn(DIM, generator=g),
        norm_bias=torch.randn(DIM, generator=g),
    )


@pytest.mark.parametrize("merged", [False, True])
def test_mixer_is_its_parts_in_a_row(merged: bool) -> None:
    core = mixer_inputs()
    x, gate = core.pop("xz").split(DIM, dim=-1)
    conv_weight, conv_bias, projection_weight, norm_weight, norm_bias = (
        core.pop(name) for name in ("conv_weight", "conv_bias", "projection_weight", "norm_weight", "norm_bias")
    )
    u = F.silu(F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1, groups=DIM)).permute(0, 2, 3, 1)
    y = structure_aware_scan(u, u @ projection_weight.T, **core)
    expected = F.layer_norm(y, (DIM,), norm_weight, norm_bias) * F.silu(gate)
    assert_near(spatial_mixer(**mixer_inputs(merged)), expected, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "dilations"), [((3, 3, 3), (1, 3, 5)), ((3,), (2,)), ((5, 3), (1, 2)), ((1, 1), (1, 4))]
)
def test_split_taps_merge_again(sizes: tuple[int, ...], dilations: tuple[int, ...]) -> None:
    count = len(tap_offsets(sizes, dilations)) // 2
    taps = torch.randn(count, DIM, generator=generator())
    kernels = split_taps(taps, sizes, dilations)
    assert [kernel.shape for kernel in kernels] == [(DIM, 1, size, size) for size in sizes]
    assert torch.equal(merge_taps(kernels, torch.ones(len(dilations)), dilations), taps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xz": torch.ones(BATCH, 4, 5, 2 * DIM + 1)}, "^xz must be"),
        ({"xz": torch.ones(BATCH, 4, 0, 2 * DIM)}, "^xz must be"),
        ({"xz": torch.ones(4, 5, 2 * DIM)}, "^xz must be"),
        ({"conv_weight": torch.ones(DIM, 9)}, "^conv_weight must be"),
        ({"conv_bias": torch.ones(1)}, "^conv_bias must be"),
        ({"projection_weight": torch.ones(4, DIM)}, r"^projection_weight must be \(R \+ 2, dim\) = \(5, 4\), got"),
        ({"step_weight": torch.ones(DIM, 0)}, "^step_weight must be .* R >= 1"),
        ({"step_weight": torch.ones(DIM + 1, 3)}, "^step_weight must be"),
        ({"step_bias": torch.ones(DIM, 1)}, "^step_bias must be"),
        ({"A_log": torch.ones(DIM, 1)}, "^A_log must be"),
        ({"D": torch.ones(1)}, "^D must be"),
        ({"norm_weight": torch.ones(1)}, "^norm_weight must be"),
        ({"norm_bias": torch.ones(1)}, "^norm_bias must be"),
        ({"alpha": torch.ones(2)}, r"alpha of \(2,\)"),
        ({"dilations": (0, 1, 2)}, "^dilations must be"),
        ({"alpha": None}, "^give either kernels and alpha, or taps; got kernels$"),
        ({"kernels": None, "alpha": None}, "^give either kernels and alpha, or taps; got none of them$"),
        ({"taps": torch.ones(25, DIM)}, "^give either kernels and alpha, or taps; got kernels, alpha, taps$"),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(27, DIM)},
            r"^taps must be .* = \(25, 4\) for kernels of sizes \(3, 3, 3\) with dilations \(1, 3, 5\), got \(27, 4\)",
        ),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(25, DIM), "kernel_sizes": (3, 4, 3)},
            r"^kernel_sizes must be odd, one per dilation of \(1, 3, 5\), got \(3, 4, 3\)",
        ),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(25, DIM), "dilations": (1, 0, 5)},
            "^dilations must be",
        ),
    ],
)
def test_mixer_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_mixer(**mixer_inputs() | change)


@pytest.mark.parametrize(
    ("function", "make"), [(depthwise_conv, conv_inputs), (gated_norm, norm_inputs), (spatial_mixer, mixer_inputs)]
)
def test_tokens_refuse_types_and_devices(function: Callable[..., Tensor], make: Callable[[], dict[str, Any]]) -> None:
    inputs = make()
    first = {depthwise_conv: "x", gated_norm: "y", spatial_mixer: "xz"}[function]
    for name in [name for name, value in inputs.items() if isinstance(value, Tensor)]:
        with pytest.raises(TypeError, match=f"^{name} must be of a real floating-point type, got torch.int64"):
            function(**inputs | {name: inputs[name].long()})
        with pytest.raises(ValueError, match=f"must be on the device of {first}"):
            function(**inputs | {name: inputs[name].to("meta")})
