"""`packed_linear` and `packed_mlp` for `torch.library`: x (..., inputs), packed weights (blocks, inputs, 64)."""

import torch
from torch import Tensor
from torch.library import custom_op

from .dispatch import backend_of


@custom_op(
    "spatial_mamba::packed_linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
        "bool relu, Tensor? residual) -> Tensor"
    ),
)
def packed_linear(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """Outputs (..., outputs), contiguous."""
    backend = backend_of(x, "packed_linear")
    return backend.packed_linear(x, packed, outputs, bias, norm_weight, norm_bias, eps, relu, residual)


@custom_op(
    "spatial_mamba::packed_mlp",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor expand, Tensor expand_bias, "
        "Tensor project, Tensor project_bias) -> Tensor"
    ),
)
def packed_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """Outputs of the shape of x, contiguous."""
    backend = backend_of(x, "packed_mlp")
    return backend.packed_mlp(x, norm_weight, norm_bias, eps, expand, expand_bias, project, project_bias)


@packed_linear.register_fake
def _(x, packed, outputs, bias, norm_weight, norm_bias, eps, relu, residual):  # noqa: ANN202
    return x.new_empty(*x.shape[:-1], outputs)


@packed_mlp.register_fake
def _(x, norm_weight, norm_bias, eps, expand, expand_bias, project, project_bias):  # noqa: ANN202
    return torch.empty_like(x)
