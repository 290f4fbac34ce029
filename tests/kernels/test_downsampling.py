"""The reference implementation of the downsampling compared with every second token of a plain convolution."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_mamba.kernels import downsampling
from spatial_mamba.kernels.backends import reference_serves

from .inputs import DIM, assert_near, assert_types_and_devices_are_refused, generator
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
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(DIM, 4, 5)}, "^x must have shape"),
        ({"expand": torch.ones(HIDDEN, DIM + 1)}, "^expand must have shape"),
        ({"expand_bias": torch.ones(1)}, "^expand_bias must have shape"),
        ({"conv_weight": torch.ones(HIDDEN, 1, 5, 5)}, "^conv_weight must have shape"),
        ({"conv_bias": torch.ones(1)}, "^conv_bias must have shape"),
        ({"project": torch.ones(OUTPUTS, DIM)}, "^project must have shape"),
        ({"project_bias": torch.ones(1)}, "^project_bias must have shape"),
    ],
)
def test_downsampling_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        downsampling(**downsampling_inputs() | change)


@pytest.mark.usefixtures("reference_backend")
def test_downsampling_refuses_types_and_devices() -> None:
    assert_types_and_devices_are_refused(downsampling, downsampling_inputs())


@pytest.mark.skipif(reference_serves(torch.zeros(()), "downsampling"), reason="autograd keeps what it needs")
def test_downsampling_keeps_only_its_inputs() -> None:
    inputs = {name: value.requires_grad_() for name, value in downsampling_inputs().items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        downsampling(**inputs)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in inputs.values())
