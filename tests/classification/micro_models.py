"""Small models, the weights and images behind the golden values, comparisons, and a harmful object."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_mamba import SpatialMamba, SpatialMambaBackbone
from spatial_mamba.kernels.backends import reference_serves

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RECOMPUTES = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # PyTorch 2.6 stores all results
PARAMETERS = {"tiny": 26_748_862, "small": 43_074_280, "base": 95_745_592}


CONFIGS = {
    "tiny": dict(dims=64, depths=(2, 4, 8, 4)),
    "small": dict(dims=64, depths=(2, 4, 21, 5)),
    "base": dict(dims=96, depths=(2, 4, 21, 5)),
}


MICRO = dict(dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.0)
FUSIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "none": dict(fusion_dilations=()),
    "two kernels": dict(fusion_dilations=(1, 2), fusion_kernel_sizes=(5, 3)),
}
half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def load_fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_fill = load_fill()


def micro_classifier(**changes: Any) -> SpatialMamba:
    """A small classifier at its initial values."""
    torch.manual_seed(0)
    return SpatialMamba(**MICRO | dict(num_classes=5) | changes)


def filled_classifier(**changes: Any) -> SpatialMamba:
    """A small classifier whose weights make every part matter."""
    return golden_fill.fill_(micro_classifier(**changes))


def micro_backbone(**changes: Any) -> SpatialMambaBackbone:
    torch.manual_seed(0)
    return SpatialMambaBackbone(**MICRO | changes)


def with_statistics(model: nn.Module) -> nn.Module:
    """Evaluation mode, with running statistics of BatchNorms that matter."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def images(*shape: int) -> Tensor:
    return golden_fill.image("test", shape or (2, 3, 64, 64))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal shapes, and equal values within ``tolerance`` of the largest magnitude expected."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


def train_step(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass, in the mode that ``model`` is in."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class RecordMixers(TorchDispatchMode):
    """Collects the outputs of the mixers' scans while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.spatial_mamba.spatial_mixer.default:
            return func(*args, **(kwargs or {}))
        result = func(*args[:-1], True)  # keep y
        self.outputs.append(result[1])
        return result


needs_native_mixer = pytest.mark.skipif(
    reference_serves(torch.zeros(())), reason="the reference implementation runs here: there is no operator to observe"
)


def perturb_fusion(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".state_fusion." in name:
                parameter.mul_(1.5).add_(0.1)


class LeavesATrace:
    """A harmful object: unpickling it without protection creates a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
