"""Recomputing intermediate results changes nothing but the memory of a training step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spatial_mamba.classification.models.recomputation import checkpointed, recomputed

from .micro_models import RECOMPUTES, micro_classifier

can_recompute = pytest.mark.skipif(not RECOMPUTES, reason="PyTorch 2.6 stores all results")


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


class Expansion(nn.Linear):
    """Remembers its results."""

    def forward(self, x: Tensor) -> Tensor:
        self.results = [*getattr(self, "results", []), super().forward(x)]
        return self.results[-1]


@can_recompute
@pytest.mark.parametrize("hooked", [False, True])
def test_results_between_checkpointed_modules_are_not_stored_unless_these_have_hooks(hooked: bool) -> None:
    first, second, x = Expansion(4, 64), nn.Linear(64, 4), torch.randn(2, 4)
    if hooked:
        first.register_forward_hook(lambda *_: None)
    out = checkpointed(first, second, x)
    first.results[0].data.zero_()  # the backward pass would see zeros if they were stored
    (found,) = torch.autograd.grad(out.sum(), second.weight)
    assert (found.abs().sum() == 0) == hooked
    assert len(first.results) == (1 if hooked else 2)


def test_weights_of_a_functional_call_are_used_again() -> None:
    model, images = micro_classifier().eval(), torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    weights = {name: weight.detach().mul(1.5).requires_grad_() for name, weight in model.named_parameters()}
    results = []
    for context in (nullcontext(), storing()):
        with context:
            logits = torch.func.functional_call(model, weights, (images,))
        results.append(torch.autograd.grad(logits.square().sum(), list(weights.values())))
    assert all(torch.equal(x, wanted) for x, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("modified", ["argument", "weight", "checkpointed argument", "checkpointed weight"])
def test_changes_in_place_are_errors(modified: str) -> None:
    norm, linear, x = nn.LayerNorm(8).requires_grad_(False), nn.Linear(8, 8), torch.randn(4, 8)
    if modified.startswith("checkpointed"):
        out = checkpointed(linear, nn.GELU(), x)
    else:
        value = norm(x)
        with recomputed(value, norm, x):
            out = linear(linear(value))
    with torch.no_grad():
        (x if modified.endswith("argument") else linear.weight).mul_(2)
    if modified != "weight" and not RECOMPUTES:
        return  # the results are stored
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        out.sum().backward()


@pytest.mark.parametrize(
    "use",
    [
        lambda value, linear: linear(value[:1]),
        lambda value, linear: linear(value.permute(0, 2, 1)),
        lambda value, linear: linear(F.dropout(value, inplace=True)),
        lambda value, linear: torch.sparse.mm(torch.eye(4).to_sparse(), value[0]) + linear.weight.sum(),
    ],
    ids=["a part", "transposed", "modified in place", "next to a sparse tensor"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_other_tensors_in_the_memory_of_the_value(use: Callable[[Tensor, nn.Module], Tensor], transposed: bool) -> None:
    act, linear, x = nn.GELU(), nn.Linear(4, 4), torch.randn(3, 4, 4)
    x = (x.mT if transposed else x).requires_grad_()
    results = []
    for recompute in (True, False):
        torch.manual_seed(0)
        value = act(x)
        with recomputed(value, act, x) if recompute else nullcontext():
            out = use(value, linear)
        results.append(torch.autograd.grad(out.square().sum(), [x, linear.weight]))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))


def test_tensors_without_memory() -> None:
    model = micro_classifier().eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.empty(0, 3, 64, 64))
    logits.sum().backward()
    model.to("meta")(torch.empty(2, 3, 64, 64, device="meta")).sum().backward()
