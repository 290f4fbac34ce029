"""The linear recurrence behind the scan: second derivatives, cost, operator schema."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spatial_mamba.kernels.recurrence import _operator, _scan_pairwise, linear_recurrence

from .inputs import DIM, generator

pytestmark = pytest.mark.usefixtures("reference_backend")


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
def test_recurrence_passes_opcheck(length: int) -> None:
    """Schema, fake form (strides included), autograd and export agree with what the operator does."""
    decays = torch.rand(2, 3, length, generator=generator()).transpose(1, 2)[:, 1:].transpose(1, 2)
    inputs = torch.randn(2, length, 3, generator=generator()).transpose(1, 2)
    opcheck(_operator, (decays.requires_grad_(), inputs.requires_grad_()))
