"""`layer_norm`: PyTorch's on CPUs; on GPUs an operator, whose checks, shapes and dtypes need no GPU."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from spatial_mamba.kernels import layer_norm
from spatial_mamba.kernels.layer_norm import reference

from .inputs import BATCH, DIM, assert_near, generator, half_types


@half_types
def test_cpu_runs_the_layer_norm_of_pytorch(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(BATCH, 3, DIM, generator=generator()).to(dtype), torch.rand(DIM), torch.rand(DIM)
    with torch.profiler.profile() as profile:
        out = layer_norm(x, weight, bias, 1e-3)
    assert torch.equal(out, F.layer_norm(x, (DIM,), weight, bias, 1e-3))
    assert profile.events()[0].name == "aten::layer_norm"


@half_types
def test_reference_is_rounded_once(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(BATCH, 3, DIM, generator=generator()) + 1).to(dtype)
    weight, bias = torch.rand(2, DIM, generator=generator()).to(dtype)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * weight.double() + bias.double()
    out = reference(x.float(), weight, bias, 1e-3)
    assert_near(out, exact, 1e-6)
    assert torch.equal(reference(x, weight, bias, 1e-3), out.to(dtype))


@pytest.fixture
def pretended_gpu() -> Iterator[torch.device]:
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.mark.parametrize("shape", [(DIM,), (3, DIM), (BATCH, 2, 3, DIM), (0, DIM)])
def test_gpu_keeps_shape_and_dtype(pretended_gpu: torch.device, shape: tuple[int, ...]) -> None:
    weight = torch.ones(DIM, device=pretended_gpu)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = layer_norm(torch.ones(shape, device=pretended_gpu, dtype=dtype), weight, weight)
        assert (out.shape, out.dtype) == (shape, dtype)


def test_gpu_refuses_wrong_arguments(pretended_gpu: torch.device) -> None:
    x, weight = torch.ones(3, DIM, device=pretended_gpu), torch.ones(DIM, device=pretended_gpu)
    with pytest.raises(ValueError, match=rf"^weight must have shape \(dim\) with dim = {DIM}, got \({DIM + 1},\)"):
        layer_norm(x, torch.ones(DIM + 1, device=pretended_gpu), weight)
    with pytest.raises(ValueError, match="bias must be on the device of x"):
        layer_norm(x, weight, torch.ones(DIM))
    with pytest.raises(TypeError, match="x must be of a real floating-point type, got"):
        layer_norm(x.long(), weight, weight)
