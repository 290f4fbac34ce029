"""Initial weights: the published distributions."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_mamba import SpatialMamba

from .micro_models import micro_classifier


@pytest.fixture(scope="module")
def initial() -> SpatialMamba:
    torch.manual_seed(0)
    return SpatialMamba(dims=32, depths=(1, 1, 2), num_classes=100)


def mixers(model: SpatialMamba) -> Iterator[nn.Module]:
    for stage in model.layers:
        for block in stage.blocks:
            yield block.self_attention


def assert_uniform(tensor: Tensor, bound: float) -> None:
    """The values are within the bound and have the standard deviation of a uniform distribution."""
    assert tensor.abs().max().item() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_initial_scan_parameters(initial: SpatialMamba) -> None:
    for mixer in mixers(initial):
        width, rank = mixer.inner_dim, mixer.dt_rank
        assert rank == math.ceil(width / 32)  # of the block's width, half the inner one
        assert (mixer.A_logs == 0).all()
        assert (mixer.Ds == 1).all()
        assert_uniform(mixer.x_proj_weight, width**-0.5)
        assert_uniform(mixer.dt_projs_weight, rank**-0.5)
        step = F.softplus(mixer.dt_projs_bias.double())
        assert step.min() >= 1e-3 * (1 - 1e-4)
        assert step.max() <= 1e-1 * (1 + 1e-4)
        assert step.log10().mean().item() == pytest.approx(-2, abs=0.25)  # log-uniform, not uniform
    ranks = [mixer.dt_rank for mixer in mixers(initial)]
    assert ranks == [2, 4, 8, 8]


def test_initial_fusion_is_a_sum(initial: SpatialMamba) -> None:
    parameters = [p for mixer in mixers(initial) for p in mixer.state_fusion.parameters()]
    assert len(parameters) == 4 * 4
    assert all((p == 1).all() for p in parameters)


def test_initial_layers(initial: SpatialMamba) -> None:
    linears = [m for m in initial.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in initial.modules() if isinstance(m, nn.Conv2d)]
    assert len(linears) == 4 * 4 + 1
    assert len(convolutions) == 5 + 2 * 3 + 4 * 3
    for linear in linears:
        assert linear.weight.mean().item() == pytest.approx(0, abs=2e-3)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias is None or (linear.bias == 0).all()
    for convolution in convolutions:
        assert_uniform(convolution.weight, convolution.weight[0].numel() ** -0.5)


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    model = micro_classifier(depths=(2, 1, 3, 1), drop_path_rate=0.3)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [block.residual_sum.drop_prob for block in blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, 7).tolist())
