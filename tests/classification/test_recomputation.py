"""Recomputing intermediate results changes nothing but the memory of a training step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spatial_mamba.classification.models.recomputation import checkpointed, recomputed

from .micro_models import micro_classifier

can_recompute = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="PyTorch 2.6 stores all results"
)


def storing() -> AbstractContextManager[Any]:
    """Store all results, as within any hooks for saved tensors."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def gradients(model: nn.Module, context: AbstractContextManager[Any]) -> list[Tensor]:
    torch.manual_seed(0)  # for stochastic depth
    with context:
        logits = model(torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))
    return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_gradients_are_the_same(context: Callable[[], AbstractContextManager[Any]]) -> None:
    model = micro_classifier(drop_path_rate=0.5).train()
    with context():
        found, expected = gradients(model, nullcontext()), gradients(model, storing())
    assert all(torch.equal(x, wanted) for x, wanted in zip(found, expected, strict=True))


@can_recompute
@pytest.mark.parametrize("hooked", [False, True])
def test_only_the_argument_is_stored_unless_the_module_has_hooks(hooked: bool) -> None:
    act, linear, x = nn.GELU(), nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    calls = []
    if hooked:
        act.register_forward_hook(lambda *_: calls.append(1))
    value = act(x)
    with recomputed(value, act, x):
        out = linear(value)
    place = value.data_ptr()
    value.data.zero_()  # the backward pass would see zeros if the value were stored
    (found,) = torch.autograd.grad(out.sum(), linear.weight)
    assert (found.abs().sum() == 0) == hooked
    assert place == value.data_ptr()
    assert len(calls) == int(hooked)


@can_recompute
def test_second_derivatives() -> None:
    act, linear, x = nn.GELU(), nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        value = act(x)
        with recomputed(value, act, x):
            return torch.nn.functional.linear(value, weight, linear.bias)

    torch.autograd.gradgradcheck(function, (x, linear.weight.detach().requires_grad_()))


@can_recompute
def test_results_inside_a_checkpointed_module_are_not_stored() -> None:
    module, x = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(2, 4)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    inner: list[Tensor] = []
    module[1].register_forward_hook(lambda _, __, out: inner.append(out.detach()))
    out = checkpointed(module, x)
    inner[0].zero_()
    found = torch.autograd.grad(out.sum(), list(module.parameters()))
    assert all(torch.equal(x, wanted) for x, wanted in zip(found, expected, strict=True))
    assert len(inner) == 2
