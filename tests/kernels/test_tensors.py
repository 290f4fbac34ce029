"""The checks of arguments that all operators share."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from spatial_mamba.kernels import layer_norm
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
    graph = make_fx(layer_norm, tracing_mode="symbolic")(torch.ones(5, 4), torch.ones(4), torch.ones(4))
    assert graph(torch.ones(7, 3), torch.ones(3), torch.ones(3)).shape == (7, 3)
