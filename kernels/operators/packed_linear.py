"""`packed_linear` and `packed_mlp` for `torch.library`: x (..., inputs), packed weights (blocks, inputs, 64).

Weights that were packed here and have come to another machine are unpacked where it lacks the kernels. No gradients.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import backends, definitions


def _backend_of(x: Tensor) -> ModuleType:
    native = x.device.type == "cpu" and backends.serving("cpu", x.dtype) == "cpu"
    cpu = torch.ops.spatial_mamba_cpu
    return cpu if native and cpu.can_pack(x.dtype) else definitions


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
    return _backend_of(x).packed_linear(x, packed, outputs, bias, norm_weight, norm_bias, eps, relu, residual)


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
    return _backend_of(x).packed_mlp(x, norm_weight, norm_bias, eps, expand, expand_bias, project, project_bias)


@packed_linear.register_fake
def _(x, packed, outputs, bias, norm_weight, norm_bias, eps, relu, residual):  # noqa: ANN202
    return x.new_empty(*x.shape[:-1], outputs)


@packed_mlp.register_fake
def _(x, norm_weight, norm_bias, eps, expand, expand_bias, project, project_bias):  # noqa: ANN202
    return torch.empty_like(x)


@register_flop_formula(torch.ops.spatial_mamba.packed_linear)
def _linear_flops(x: Sequence[int], packed: Sequence[int], outputs: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * outputs


@register_flop_formula(torch.ops.spatial_mamba.packed_mlp)
def _mlp_flops(
    x: Sequence[int],
    norm_weight: Sequence[int],
    norm_bias: Sequence[int],
    eps: float,
    expand: Sequence[int],
    expand_bias: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return 4 * math.prod(x) * expand_bias[0]
