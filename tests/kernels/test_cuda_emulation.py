"""The CUDA kernels without a GPU: their sources compiled by a C++ compiler and run on the CPU, thread by thread.

``cuda_emulator/`` stands in for the CUDA runtime. It aborts the process where threads diverge at a barrier or shuffle,
or write beyond their shared memory, which starts as NaN. Threads take turns in a random order. Misaligned accesses end
the process, too. Inputs end at a page that must not be touched, and memory that the operators allocate starts as NaN.
"""

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_mamba.kernels import backends, build, use_backend
from spatial_mamba.kernels.depthwise_conv import DEPTHWISE_CONV, EPILOGUES
from spatial_mamba.kernels.downsampling import DOWNSAMPLING
from spatial_mamba.kernels.gated_norm import GATED_NORM
from spatial_mamba.kernels.layer_norm import LAYER_NORM
from spatial_mamba.kernels.mlp import MLP
from spatial_mamba.kernels.registration import Operator
from spatial_mamba.kernels.selective_scan import SELECTIVE_SCAN
from spatial_mamba.kernels.spatial_mixer import SPATIAL_MIXER
from spatial_mamba.kernels.state_fusion import STATE_FUSION, tap_offsets
from spatial_mamba.kernels.structure_aware_scan import STRUCTURE_AWARE_SCAN

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "csrc" / "cuda"
EMULATOR = HERE / "cuda_emulator"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cuda_emulation")]
NAMESPACE = "spatial_mamba_cuda_emulated"
TORCH = Path(torch.__file__).parent

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 8e-6, BF16: 2**-8, F16: 2**-11}  # of the result's dtype, relative to its largest magnitude
Branches = tuple[Sequence[int], Sequence[int]]  # sizes and dilations of the fusion kernels
PUBLISHED: Branches = ((3, 3, 3), (1, 3, 5))
OTHER_KERNELS: Branches = ((5, 3), (2, 7))


def compile_with(*flags: str | Path) -> None:
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    command = [*compiler, f"-std=c++{build.cxx_standard()}", f"-I{EMULATOR}", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled emulator."""
    compiled = tmp_path_factory.mktemp("emulator") / "emulator.o"
    compile_with("-O1", "-fPIC", "-c", EMULATOR / "emulator.cpp", "-o", compiled)
    return compiled


@pytest.fixture(scope="module")
def library(emulator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled operators."""
    folder = tmp_path_factory.mktemp("cuda_emulated")
    flags = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    flags += [f"-DSPATIAL_MAMBA_NAMESPACE={NAMESPACE}", "-DSPATIAL_MAMBA_DEVICE=CPU"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-fPIC"]
    objects = [emulator]
    for source in [*sorted(SOURCES.glob("*.cu")), *sorted(SOURCES.glob("*.cpp"))]:
        objects.append(folder / f"{source.stem}.o")
        level = "-O0" if source.name == "operators.cpp" else "-O1"  # the time goes into the headers of PyTorch
        compile_with(level, *flags, "-x", "c++", "-c", source, "-o", objects[-1])
    compiled = folder / "emulated.so"
    compile_with("-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", compiled)
    return compiled


@pytest.fixture(scope="module")
def operators(library: Path) -> Any:
    torch.ops.load_library(library)
    return getattr(torch.ops, NAMESPACE)


@pytest.fixture(autouse=True)
def fill_fresh_memory_with_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def guarded(x: Tensor) -> Tensor:
    """A copy that ends where an inaccessible page begins: reading beyond it crashes. Strided views are not copied."""
    if not x.numel() or not x.is_contiguous():
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, no_access) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * mmap.PAGESIZE - size)
    return copy.reshape(x.shape).copy_(x)


def on_tensors(function: Callable[[Tensor], Tensor], arguments: Sequence[Any]) -> list[Any]:
    return [function(x) if isinstance(x, Tensor) else x for x in arguments]


def assert_matches_reference(
    operators: Any,
    operator: Operator,
    arguments: Sequence[Any],
    roundings: tuple[int, int] = (1, 1),
    rounds_to: torch.dtype = F32,
) -> tuple[Tensor, ...]:
    """An emulated operator matches the reference implementation in float64 both ways; returns the gradients.

    ``roundings`` of the outputs, and of the gradients, are above 1 if these are computed from values that the operator
    rounds, to ``rounds_to``.
    """

    def compare(emulated: Any, reference: Any, arguments: Sequence[Any], roundings: int) -> tuple[Tensor, ...]:
        found = emulated(operators, *on_tensors(guarded, arguments))
        with use_backend("torch"):
            expected = reference(*on_tensors(Tensor.double, arguments))
        found, expected = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, expected))
        storages = {result.untyped_storage()._cdata for result in found}
        assert len(storages) == len(found), "torch.library wants outputs that share no memory"
        for i, (result, wanted) in enumerate(zip(found, expected, strict=True)):
            assert result.shape == wanted.shape, f"result {i} of {operator.name}"
            if result.numel() == 0:
                continue
            error = (result.double() - wanted.double()).abs().max().item()
            rounding = roundings * max(ROUNDING.get(result.dtype, 0.0), ROUNDING[rounds_to])
            bound = rounding * wanted.double().abs().max().item()
            assert error <= bound, f"result {i} of {operator.name} is off by {error:.3g}, allowed are {bound:.3g}"
        return found

    outputs = compare(operator._forward, operator.run, arguments, roundings[0])
    grads = map(torch.randn_like, outputs[: operator.num_differentiable])
    backward = backward_arguments(operator, arguments, outputs, grads)
    return compare(operator._backward, operator.run_backward, backward, roundings[1])


def backward_arguments(
    operator: Operator, arguments: Sequence[Any], outputs: Sequence[Tensor], grads: Iterable[Tensor]
) -> list[Any]:
    tensors, others = arguments[: operator.num_tensors], arguments[operator.num_tensors :]
    return [*grads, *tensors, *outputs[operator.num_differentiable :], *others]


def random_normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# --- What holds for every backend -------------------------------------------------------------------------------------

IN_PLACE_OF_CPU_KERNELS = f"""
import pytest, sys, torch
from spatial_mamba.kernels import backends

torch.ops.load_library(sys.argv.pop(1))
chosen = backends.module_for

def module_for(tensor, operator):
    module = chosen(tensor, operator)
    has_kernels = tensor.dtype in backends.DTYPES["cuda"] and backends.implements("cuda", operator)
    return torch.ops.{NAMESPACE} if module and has_kernels else module

backends.module_for = module_for
sys.exit(pytest.main())
"""


def test_what_holds_for_every_backend(library: Path) -> None:
    if why := backends.why_not("cpu", "cpu", F32):
        pytest.skip(f"runs the tests of the CPU kernels: {why}")
    # Without the longest scans, which are slow here, and gradcheck, since the CUDA kernels do not support float64.
    chosen = "cpu-on-cpu and not 4096 and not gradcheck"
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, "tests/kernels/test_backends.py")
    result = subprocess.run(
        [sys.executable, "-c", IN_PLACE_OF_CPU_KERNELS, library, *options],
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    assert int(passed[1]) > 100


# --- The operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [PUBLISHED, OTHER_KERNELS], ids=["dilations 1-3-5", "other kernels"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 9, 40), (1, 1, 1, 3), (1, 3, 2, 33)], ids=str)
def test_state_fusion(operators: Any, shape: tuple[int, ...], dtype: torch.dtype, branches: Branches) -> None:
    torch.manual_seed(0)
    h, taps = random_normal(*shape, dtype=dtype), random_normal(number_of_taps(branches), shape[-1])
    assert_matches_reference(operators, STATE_FUSION, (h, taps, *branches))


maps = pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 5, 7, 40), id="pairs of channels"),
        pytest.param((1, 30, 3, 70), id="bands of rows"),
        pytest.param((1, 62, 6, 70), id="more bands, an even width"),
        pytest.param((2, 4, 2, 33), id="channels that do not pair up"),
        pytest.param((2, 4, 3, 33), id="the same, an odd width"),
        pytest.param((1, 1, 1, 2), id="one token"),
    ],
)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@maps
def test_depthwise_conv(operators: Any, shape: tuple[int, ...], dtype: torch.dtype, epilogue: str) -> None:
    torch.manual_seed(0)
    dim = shape[-1]
    x, weight, bias = random_normal(*shape, dtype=dtype), random_normal(dim, 1, 3, 3), random_normal(dim)
    roundings = (1, 2 if epilogue == "silu" else 1)
    assert_matches_reference(operators, DEPTHWISE_CONV, (x, weight, bias, epilogue), roundings)


@pytest.mark.parametrize("dim", [3, 36, 68, 96, 256, 270, 512, 1500, 2052])
@pytest.mark.parametrize(("dtype", "y_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str)
def test_norms(operators: Any, dtype: torch.dtype, y_dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    y, gate = 3 + random_normal(2, 5, 7, dim, dtype=y_dtype), random_normal(2, 5, 7, dim, dtype=dtype)
    weights = (random_normal(dim), random_normal(dim), 1e-5)
    assert_matches_reference(operators, GATED_NORM, (y, gate, *weights))
    if y_dtype == dtype:
        assert_matches_reference(operators, LAYER_NORM, (y, *weights))


@maps
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_downsampling(operators: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *image, hidden = shape
    # The hidden layer is exact and nowhere zero, so that rounding changes no ReLU.
    x, expand = (torch.randint(-2, 3, size).to(dtype) for size in ((*image, 12), (hidden, 12)))
    expand_bias = torch.randint(-9, 9, (hidden,)).to(dtype) + 0.5
    conv_weight, conv_bias = random_normal(hidden, 1, 3, 3), random_normal(hidden)
    project, project_bias = random_normal(10, hidden, dtype=dtype), random_normal(10, dtype=dtype)
    arguments = (x, expand, expand_bias, conv_weight, conv_bias, project, project_bias)
    assert_matches_reference(operators, DOWNSAMPLING, arguments, roundings=(2, 2), rounds_to=dtype)


@pytest.mark.parametrize(("tokens", "hidden"), [(150, 512), (5, 296), (70, 37), (0, 16)])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_mlp(operators: Any, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    """More tokens than blocks have at once, warps with fewer channels, channels that are no vectors, and no tokens."""
    torch.manual_seed(0)
    shapes = [(tokens, 12), (hidden, 12), (hidden,), (10, hidden), (10,)]
    arguments = [random_normal(*shape, dtype=dtype) for shape in shapes]
    assert_matches_reference(operators, MLP, (*arguments, True), roundings=(2, 2))
    assert len(operators.mlp(*arguments, False)[1]) == 0


def test_norms_of_too_many_channels_are_refused(operators: Any) -> None:
    x, weight = torch.zeros(1, 4097), torch.zeros(4097)
    with pytest.raises(ValueError, match="at most 4096 channels, got 4097; SPATIAL_MAMBA_BACKEND"):
        operators.layer_norm(x, weight, weight, 1e-5)


def test_layer_norm_of_other_weights(operators: Any) -> None:
    """Weights in float64, and a bias whose memory holds a single element."""
    x, weight, bias = random_normal(3, 4, dtype=BF16), random_normal(4).double(), random_normal(1).expand(4)
    _, grad_weight, grad_bias = assert_matches_reference(operators, LAYER_NORM, (x, weight, bias, 1e-5))
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.float64, F32)


def test_infinite_values_stay_in_their_sums(operators: Any) -> None:
    """What threads compute for columns and tokens that do not exist is not added."""
    x, weight = (
        torch.tensor([1, 1, 3e38]).view(1, 1, 3, 1),
        torch.tensor([0, 0, 0, 2.0, 0, 0, 0, 0, 0]).view(1, 1, 3, 3),
    )
    _, *grads = DEPTHWISE_CONV._backward(operators, torch.ones_like(x), x, weight, torch.zeros(1), "silu")
    assert all(grad.isfinite().all() for grad in grads)

    torch.manual_seed(0)
    y, gate, grad_out = random_normal(3, 1, 1, 1, 8)
    gate[..., 0] = float("inf")
    arguments = (grad_out, y, gate, torch.ones(8), torch.zeros(8), 1e-5)
    _, _, *found = GATED_NORM._backward(operators, *arguments)
    with use_backend("torch"):
        _, _, *wanted = GATED_NORM.run_backward(*arguments)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dim", [6, 7])
def test_channels_of_wider_maps(operators: Any, dim: int) -> None:
    """Halves of a map, which need not be aligned, give what contiguous copies give; gradients are written in place."""
    torch.manual_seed(0)
    x, gate = random_normal(2, 4, 5, 2 * dim, dtype=BF16).chunk(2, dim=-1)
    grad_out, grads = random_normal(2, 4, 5, dim, dtype=BF16), torch.zeros(2, 4, 5, 2 * dim, dtype=BF16)
    grad_x, grad_gate = grads.chunk(2, dim=-1)
    conv = (random_normal(dim, 9), random_normal(dim), "silu")
    norm = (random_normal(dim), random_normal(dim), 1e-5)
    results = [
        [
            operators.depthwise_conv(x, *conv),
            *operators.depthwise_conv_backward(grad_out, x, *conv, into_x),
            into_x,
            operators.gated_norm(grad_out, gate, *norm),
            *operators.gated_norm_backward(grad_out, grad_out, gate, *norm, into_gate),
            into_gate,
        ]
        for x, gate, into_x, into_gate in [
            (x, gate, grad_x, grad_gate),
            (x.contiguous(), gate.contiguous(), torch.empty_like(grad_out), torch.empty_like(grad_out)),
        ]
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [True, False])
def test_spatial_mixer(operators: Any, keep: bool) -> None:
    torch.manual_seed(0)
    dim, rank, shape = 12, 2, (2, 6, 5)
    _, _, *core = core_arguments((*shape, dim), rank)[: STRUCTURE_AWARE_SCAN.num_tensors]
    weights = (random_normal(dim, 1, 3, 3), random_normal(dim), random_normal(rank + 2, dim), *core)
    arguments = (random_normal(*shape, 2 * dim), *weights, random_normal(dim), random_normal(dim), *PUBLISHED, 1e-5)
    assert_matches_reference(operators, SPATIAL_MIXER, (*arguments, keep))


def number_of_taps(branches: Branches) -> int:
    return len(tap_offsets(*branches)) // 2


def core_arguments(
    shape: Sequence[int],
    rank: int,
    dtype: torch.dtype = F32,
    out_dtype: torch.dtype = F32,
    branches: Branches = PUBLISHED,
) -> list[Any]:
    *image, dim = shape
    u, projection = random_normal(*shape, dtype=dtype), random_normal(*image, rank + 2, dtype=dtype)
    step_weight, step_bias = random_normal(dim, rank) / rank**0.5, random_normal(dim) - 2
    return [u, projection, step_weight, step_bias, 0.5 * random_normal(dim), random_normal(dim),
            random_normal(number_of_taps(branches), dim), *branches, out_dtype]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "rank", "dtype", "out_dtype", "branches"),
    [
        pytest.param((2, 7, 9, 40), 3, F32, F32, PUBLISHED, id="small"),
        pytest.param((1, 13, 14, 32), 4, BF16, F32, PUBLISHED, id="as in the model"),
        pytest.param((1, 1, 1, 6), 1, F16, F16, PUBLISHED, id="one token"),
        pytest.param((1, 3, 2, 1), 2, F32, F32, PUBLISHED, id="one channel"),
        pytest.param((2, 2, 1, 6), 2, BF16, F16, PUBLISHED, id="a pair of types that no kernel has"),
        pytest.param((0, 4, 4, 8), 2, F32, F32, PUBLISHED, id="no image"),
        pytest.param((65, 18, 1, 128), 1, F32, F32, PUBLISHED, id="images enough to split none"),
        pytest.param((1, 70, 3, 16), 1, F16, F32, PUBLISHED, id="bands of rows"),
        pytest.param((1, 3, 130, 34), 2, BF16, BF16, PUBLISHED, id="strips of columns"),
        pytest.param((1, 7, 70, 33), 2, BF16, BF16, PUBLISHED, id="channels that do not pair up"),
        pytest.param((2, 29, 28, 16), 8, BF16, F32, PUBLISHED, id="chunks of rows"),
        pytest.param((1, 13, 21, 18), 5, F32, F32, PUBLISHED, id="whole runs, odd rank"),
        pytest.param((1, 70, 7, 16), 3, F16, F32, PUBLISHED, id="whole runs, bands of rows"),
        pytest.param((1, 6, 8, 6), 130, F32, F32, PUBLISHED, id="a step of very high rank"),
        pytest.param((1, 18, 130, 8), 5, F32, F32, PUBLISHED, id="bands and strips"),
        pytest.param((1, 2, 3, 8), 40, BF16, F32, PUBLISHED, id="a step of high rank"),
        pytest.param((1, 6, 5, 8), 2, F32, F32, OTHER_KERNELS, id="other kernels"),
        pytest.param((2, 3, 70, 33), 2, F16, F32, OTHER_KERNELS, id="other kernels, long rows"),
    ],
)
def test_structure_aware_scan(
    operators: Any, shape: Sequence[int], rank: int, dtype: torch.dtype, out_dtype: torch.dtype, branches: Branches
) -> None:
    torch.manual_seed(0)
    arguments = core_arguments(shape, rank, dtype, out_dtype, branches)
    assert_matches_reference(operators, STRUCTURE_AWARE_SCAN, arguments)


def test_autocast_and_unaligned_tokens_change_nothing(operators: Any) -> None:
    torch.manual_seed(0)
    arguments = core_arguments((1, 6, 7, 8), 4, BF16)
    outputs = STRUCTURE_AWARE_SCAN._forward(operators, *arguments)
    backward = backward_arguments(STRUCTURE_AWARE_SCAN, arguments, outputs, [torch.randn_like(outputs[0])])
    expected = STRUCTURE_AWARE_SCAN._backward(operators, *backward)
    with torch.autocast("cpu", BF16):
        found = STRUCTURE_AWARE_SCAN._backward(operators, *backward)
    assert all(torch.equal(x, wanted) for x, wanted in zip(found, expected, strict=True))

    u = arguments[0]
    shifted = torch.cat([u.flatten()[:1], u.flatten()])[1:].view_as(u)
    assert shifted.data_ptr() % 4 == 2
    y, _ = STRUCTURE_AWARE_SCAN._forward(operators, shifted, *arguments[1:])
    torch.testing.assert_close(y, outputs[0], rtol=1e-5, atol=1e-5)
    found = STRUCTURE_AWARE_SCAN._backward(operators, backward[0], shifted, *backward[2:])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_extreme_delta(operators: Any) -> None:
    """Delta from 0 to 1e4: decays of exactly one and zero, states that keep or forget everything."""
    torch.manual_seed(0)
    arguments = core_arguments((1, 6, 6, 32), 2)
    arguments[3] = torch.tensor([-1e4, -90, -20, -3, 0, 20, 100, 1e4]).repeat(4)
    assert_matches_reference(operators, STRUCTURE_AWARE_SCAN, arguments)


@pytest.mark.parametrize("dim", [8, 5])
@pytest.mark.parametrize("argument", ["u", "C", "A_log"])
def test_infinite_values_do_not_spread(operators: Any, argument: str, dim: int) -> None:
    """Outputs and row states are as in the reference implementation; the next image has finite gradients."""
    torch.manual_seed(0)
    arguments = core_arguments((2, 9, 9, dim), 4)
    if argument == "A_log":
        arguments[4][1] = 100.0  # the rate overflows, and the state is forgotten at each token
    else:
        arguments[0 if argument == "u" else 1][0, 6, 3, -1] = float("inf")
    outputs = STRUCTURE_AWARE_SCAN._forward(operators, *arguments)
    with use_backend("torch"):
        expected = STRUCTURE_AWARE_SCAN.run(*arguments)
    for found, wanted in zip(outputs, expected, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(found.isfinite(), finite)
        torch.testing.assert_close(found[finite], wanted[finite], rtol=1e-4, atol=1e-5)
    backward = backward_arguments(STRUCTURE_AWARE_SCAN, arguments, outputs, [torch.ones_like(outputs[0])])
    grad_u, grad_projection, *_ = STRUCTURE_AWARE_SCAN._backward(operators, *backward)
    assert grad_u[1].isfinite().all()
    assert grad_projection[1].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "dim", "length", "states", "groups", "dtype"),
    [
        (1, 4, 700, 3, 2, F32),  # two chunks, the second not full
        (2, 4, 5, 1, 1, BF16),
        (1, 3, 512, 2, 3, F16),
    ],
)
@pytest.mark.parametrize("given", ["C D z delta_bias softplus", "C", "states softplus delta_bias", "states"])
def test_selective_scan(
    operators: Any, batch: int, dim: int, length: int, states: int, groups: int, dtype: torch.dtype, given: str
) -> None:
    torch.manual_seed(0)
    u, delta, z = random_normal(3, batch, dim, length, dtype=dtype)
    softplus = "softplus" in given
    optional = {
        "C": random_normal(batch, groups, states, length, dtype=dtype),
        "D": random_normal(dim),
        "z": z.clone(),
        "delta_bias": random_normal(dim),
    }
    C, D, z, delta_bias = (value if name in given.split() else None for name, value in optional.items())
    B = random_normal(batch, groups, states, length, dtype=dtype)
    A = -0.5 - torch.rand(dim, states)
    arguments = (u.clone(), delta.clone() if softplus else delta.abs(), A, B, C, D, z, delta_bias, softplus)
    assert_matches_reference(operators, SELECTIVE_SCAN, arguments)


def test_selective_scan_of_many_sequences(operators: Any) -> None:
    """So many channels that a block of the backward pass sums over several of them."""
    torch.manual_seed(0)
    batch, dim, groups = 129, 16, 2
    u, B, C = random_normal(batch, dim, 1), random_normal(batch, groups, 1, 1), random_normal(batch, groups, 1, 1)
    arguments = (u, u.abs(), -torch.ones(dim, 1), B, C, None, None, None, False)
    assert_matches_reference(operators, SELECTIVE_SCAN, arguments)


def test_order_of_threads_does_not_matter(operators: Any) -> None:
    torch.manual_seed(0)
    arguments = core_arguments((1, 9, 121, 24), 2)
    results = []
    for _ in range(3):  # each in another order
        outputs = STRUCTURE_AWARE_SCAN._forward(operators, *arguments)
        backward = backward_arguments(STRUCTURE_AWARE_SCAN, arguments, outputs, outputs[:1])
        results.append((*outputs, *STRUCTURE_AWARE_SCAN._backward(operators, *backward)))
    for others in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], others, strict=True))


# --- The emulator itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("if (threadIdx.x < 32) __syncthreads();", "divergence"),
        ("if (threadIdx.x != 3) __shfl_xor_sync(0xffffffffu, 1.0f, 1);", "divergence"),
        ("shared_memory[threadIdx.x + 1] = 0.0f;", "behind its end"),
        ("alignas(8) float x[3]; __pipeline_memcpy_async(shared_memory, x, 8);", "did not wait for its copies"),
        ("alignas(8) float x[3]; __pipeline_memcpy_async(shared_memory, x + 1, 8);", "not aligned"),
        ("alignas(8) float x[3]; __pipeline_memcpy_async(shared_memory, x, 8); __pipeline_wait_prior(0);", ""),
        ("shared_memory[threadIdx.x] = 0.0f; __syncthreads(); __syncwarp();", ""),
    ],
)
def test_emulator_finds_faults(emulator: Path, tmp_path: Path, kernel: str, message: str) -> None:
    program, source = tmp_path / "program", tmp_path / "program.cpp"
    source.write_text(f"""
        #include "cuda_pipeline_primitives.h"
        #include "cuda_runtime.h"
        extern float shared_memory[];
        void kernel() {{ {kernel} }}
        int main() {{
          cudaLaunchConfig_t config = {{dim3(1), dim3(64), 64 * sizeof(float), nullptr}};
          return cudaLaunchKernelEx(&config, kernel);
        }}""")
    compile_with(source, emulator, "-o", program)
    result = subprocess.run([program], capture_output=True, text=True)
    assert (result.returncode != 0) == bool(message)
    assert message in result.stderr
