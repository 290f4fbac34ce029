"""The checks of arguments that all operators share."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spatial_mamba.kernels import mlp
from spatial_mamba.kernels.tensors import MOST_REMEMBERED, check_tensors, layouts


def test_shapes_that_fit_are_remembered_up_to_a_limit() -> None:
    expected = layouts(x="batch, 2 dim", weight="dim, R + 2")
    for batch in range(MOST_REMEMBERED + 5):
        found = check_tensors(expected, dict(x=torch.empty(batch, 8), weight=torch.empty(4, 5)))
        assert found == dict(batch=batch, dim=4, R=3)
    assert 0 < len(expected.checked) <= MOST_REMEMBERED


def test_a_shape_that_fitted_with_others_is_an_error_again() -> None:
    expected = layouts(x="batch, dim", weight="dim")
    x, weight = torch.empty(2, 4), torch.empty(4)
    check_tensors(expected, dict(x=x, weight=weight))
    for change in (dict(weight=torch.empty(5)), dict(x=torch.empty(2, 5)), dict(x=torch.empty(4, 2))):
        with pytest.raises(ValueError, match=r"^weight must have shape"):
            check_tensors(expected, dict(x=x, weight=weight) | change)
    with pytest.raises(ValueError, match=r"^x must have shape"):
        check_tensors(expected, dict(x=x, weight=weight), dim=5)
    with pytest.raises(TypeError, match="weight must be of a real floating-point type"):
        check_tensors(expected, dict(x=x, weight=weight.long()))


def test_shapes_of_a_trace_may_be_symbols() -> None:
    def arguments(tokens: int, dim: int, hidden: int, outputs: int) -> list[Tensor]:
        return [
            torch.ones(*shape) for shape in ((tokens, dim), (hidden, dim), (hidden,), (outputs, hidden), (outputs,))
        ]

    graph = make_fx(mlp, tracing_mode="symbolic")(*arguments(5, 4, 6, 3))
    assert graph(*arguments(7, 2, 8, 5)).shape == (7, 5)
