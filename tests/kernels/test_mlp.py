"""The reference implementation of the MLP compared with sums over channels; what it keeps and refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_mamba.kernels import mlp
from spatial_mamba.kernels.backends import reference_serves

from .inputs import assert_near, assert_wrong_tensors_are_refused, generator

TOKENS, DIM, HIDDEN, OUTPUTS = 6, 4, 5, 3


def mlp_inputs() -> dict[str, Any]:
    g = generator()
    shapes = dict(
        x=(2, TOKENS // 2, DIM),
        expand=(HIDDEN, DIM),
        expand_bias=(HIDDEN,),
        project=(OUTPUTS, HIDDEN),
        project_bias=(OUTPUTS,),
    )
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.usefixtures("reference_backend")
def test_mlp_matches_sums_over_channels() -> None:
    inputs = mlp_inputs()
    x, expand, expand_bias, project, project_bias = (value.double() for value in inputs.values())
    hidden = (x[..., None, :] * expand).sum(-1) + expand_bias
    activated = hidden * torch.erfc(-hidden / math.sqrt(2)) / 2
    assert_near(mlp(**inputs), (activated[..., None, :] * project).sum(-1) + project_bias, 1e-6)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, DIM + 1)}, rf"^x must have shape \(\.\.\., {DIM}\), got \(2, {DIM + 1}\)$"),
        ({"x": torch.tensor(1.0)}, r"^x must have shape .*, got \(\)$"),
        ({"expand": torch.ones(HIDDEN, 0)}, r"^expand must have shape \(hidden, dim\) with hidden, dim >= 1"),
    ],
)
def test_mlp_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(**mlp_inputs() | change)


@pytest.mark.usefixtures("reference_backend")
def test_mlp_refuses_wrong_tensors() -> None:
    shapes = dict(expand_bias=[(HIDDEN + 1,)], project=[(OUTPUTS, DIM)], project_bias=[(1,)])
    assert_wrong_tensors_are_refused(mlp, mlp_inputs(), **shapes)


@pytest.mark.skipif(reference_serves(torch.zeros(()), "mlp"), reason="autograd keeps what it needs")
def test_mlp_keeps_its_inputs_and_one_hidden_layer_for_training_alone() -> None:
    inputs = mlp_inputs()
    for training in (True, False):
        kept: list[Tensor] = []
        leaves = {name: value.requires_grad_(training) for name, value in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
            mlp(**leaves)
        sizes = [*(value.numel() for value in inputs.values()), TOKENS * HIDDEN]
        assert sorted(x.numel() for x in kept) == (sorted(sizes) if training else [])


@pytest.mark.parametrize("shape", [(2, 0, 3, DIM), (DIM,)])
def test_mlp_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    leaves = {name: value.requires_grad_() for name, value in (mlp_inputs() | {"x": torch.ones(shape)}).items()}
    out = mlp(**leaves)
    assert out.shape == (*shape[:-1], OUTPUTS)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]
