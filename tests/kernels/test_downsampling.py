"""The reference implementation of the downsampling compared with every second token of a plain convolution."""

import pytest
import torch
from torch import Tensor

from spatial_mamba.kernels import downsampling
from spatial_mamba.kernels.backends import reference_serves

from .inputs import DIM, assert_near, assert_wrong_tensors_are_refused, generator
from .test_depthwise_conv import convolve_by_shifting

HIDDEN, OUTPUTS = 6, 5


def downsampling_inputs(height: int = 4, width: int = 5) -> dict[str, Tensor]:
    g = generator()
    shapes = dict(
        x=(2, height, width, DIM),
        expand=(HIDDEN, DIM),
        expand_bias=(HIDDEN,),
        conv_weight=(HIDDEN, 1, 3, 3),
        conv_bias=(HIDDEN,),
        project=(OUTPUTS, HIDDEN),
        project_bias=(OUTPUTS,),
    )
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("size", [(4, 5), (3, 2)])
def test_downsampling_matches_every_second_token(size: tuple[int, int]) -> None:
    inputs = downsampling_inputs(*size)
    x, expand, expand_bias, conv_weight, conv_bias, project, project_bias = (t.double() for t in inputs.values())
    hidden = ((x[..., None, :] * expand).sum(-1) + expand_bias).clamp(min=0)
    sampled = convolve_by_shifting(hidden, conv_weight, conv_bias)[:, ::2, ::2].clamp(min=0)
    assert_near(downsampling(**inputs), (sampled[..., None, :] * project).sum(-1) + project_bias, 1e-6)


@pytest.mark.usefixtures("reference_backend")
def test_downsampling_refuses_wrong_tensors() -> None:
    assert_wrong_tensors_are_refused(
        downsampling,
        downsampling_inputs(),
        x=[(DIM, 4, 5)],
        expand=[(HIDDEN, DIM + 1)],
        expand_bias=[(1,)],
        conv_weight=[(HIDDEN, 1, 5, 5)],
        conv_bias=[(1,)],
        project=[(OUTPUTS, DIM)],
        project_bias=[(1,)],
    )


@pytest.mark.skipif(reference_serves(torch.zeros(()), "downsampling"), reason="autograd keeps what it needs")
def test_downsampling_keeps_only_its_inputs() -> None:
    inputs = {name: value.requires_grad_() for name, value in downsampling_inputs().items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        downsampling(**inputs)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in inputs.values())
