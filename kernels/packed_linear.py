"""Linear layers of a model's inference form: weights in the order in which matrix units read them, and what lies
before and behind a layer done while its tokens are in the cache.

For CPUs: elsewhere libraries' linear layers under `torch.compile` serve. There are no gradients.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .registration import Operator

COLUMNS = 64  # outputs per block


def can_pack(weight: Tensor) -> bool:
    """Whether a weight (outputs, inputs) can be packed here: on this device, for its dtype and its number of inputs."""
    return (
        weight.device.type == "cpu"
        and weight.shape[1] % _inputs_per_row(weight.dtype) == 0
        and backends.why_not("cpu", "cpu", weight.dtype) is None
        and torch.ops.spatial_mamba_cpu.can_pack(weight.dtype)
    )


def pack_weight(weight: Tensor) -> Tensor:
    """Pack the weight of a linear layer.

    Args:
        weight: (outputs, inputs), one for which `can_pack` is true.

    Returns:
        (ceil(outputs / 64), inputs, 64): blocks of outputs, the last filled up with zeros. Half-precision types have
        the inputs in pairs.

    Raises:
        ValueError: if it cannot be packed here.
    """
    if not can_pack(weight):
        what = f"a weight of {tuple(weight.shape)}, {weight.dtype}, on {weight.device}"
        raise ValueError(f"{what} cannot be packed here: keep it as it is")
    return torch.ops.spatial_mamba_cpu.pack_weight(weight.detach().contiguous())


def packed_linear(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(linear(layer_norm(x)))`` or ``linear(layer_norm(x)) + residual``, without what is not given.

    Args:
        x: (..., inputs), in the dtype of all other tensors.
        packed: from `pack_weight`.
        outputs: of the layer.
        bias: (outputs,).
        norm_weight, norm_bias: (inputs,), both or none.
        eps: added to the variance.
        relu: whether the activation follows.
        residual: (..., outputs), not with ``relu``.

    Returns:
        (..., outputs).

    Raises:
        ValueError: if shapes do not fit together.
        TypeError: if dtypes differ.
    """
    expected = {
        "packed": (-(-outputs // COLUMNS), x.shape[-1], COLUMNS),
        "bias": (outputs,),
        "norm_weight": (x.shape[-1],),
        "norm_bias": (x.shape[-1],),
        "residual": (*x.shape[:-1], outputs),
    }
    given = dict(packed=packed, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    _check(x, given, expected)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("give both norm_weight and norm_bias, or none of them")
    if relu and residual is not None:
        raise ValueError("give relu or a residual, not both")
    bias, norm_weight, norm_bias, residual = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, norm_weight, norm_bias, residual)
    )
    tensors = (packed.contiguous(), bias, norm_weight, norm_bias, residual)
    return PACKED_LINEAR(x.contiguous(), *tensors, outputs, eps, relu)


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
    """``x + linear(gelu(linear(layer_norm(x))))``; the hidden activations never reach memory.

    Args:
        x: (..., dim), in the dtype of all other tensors.
        norm_weight, norm_bias: (dim,).
        eps: added to the variance.
        expand, project: from `pack_weight`, of weights (hidden, dim) and (dim, hidden).
        expand_bias, project_bias: (hidden,) and (dim,).

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: if shapes do not fit together.
        TypeError: if dtypes differ.
    """
    dim, hidden = x.shape[-1], project.shape[1]
    expected = {
        "norm_weight": (dim,),
        "norm_bias": (dim,),
        "expand": (-(-hidden // COLUMNS), dim, COLUMNS),
        "expand_bias": (hidden,),
        "project": (-(-dim // COLUMNS), hidden, COLUMNS),
        "project_bias": (dim,),
    }
    given = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        expand=expand,
        expand_bias=expand_bias,
        project=project,
        project_bias=project_bias,
    )
    _check(x, given, expected)
    weights = (norm_weight, norm_bias, expand, expand_bias, project, project_bias)
    return PACKED_MLP(x.contiguous(), *(weight.contiguous() for weight in weights), eps)


def unpack_weight(packed: Tensor, outputs: int) -> Tensor:
    """Undo `pack_weight`: the weight (outputs, inputs)."""
    pair = _inputs_per_row(packed.dtype)
    blocks, inputs, columns = packed.shape
    pairs = packed.view(blocks, inputs // pair, columns, pair)
    return pairs.permute(0, 2, 1, 3).reshape(blocks * columns, inputs)[:outputs].contiguous()


def _inputs_per_row(dtype: torch.dtype) -> int:
    """How many inputs lie side by side: matrix units take half-precision values in pairs."""
    return 2 if dtype.itemsize == 2 else 1


def linear_reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """The reference implementation of `packed_linear`."""
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    out = F.linear(x, unpack_weight(packed, outputs), bias)
    if relu:
        out = F.relu(out)
    return out if residual is None else residual + out


def mlp_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    eps: float,
) -> Tensor:
    """The reference implementation of `packed_mlp`."""
    hidden = linear_reference(x, expand, expand_bias, norm_weight, norm_bias, None, len(expand_bias), eps, False)
    return linear_reference(F.gelu(hidden), project, project_bias, None, None, x, len(project_bias), 0.0, False)


def _linear_forward(backend: ModuleType, x: Tensor, *others: Any) -> Tensor:
    if not backend.can_pack(x.dtype):  # packed on another machine
        return linear_reference(x, *others)
    packed, bias, norm_weight, norm_bias, residual, outputs, eps, relu = others
    return backend.packed_linear(x, packed, outputs, bias, norm_weight, norm_bias, eps, relu, residual)


def _mlp_forward(backend: ModuleType, x: Tensor, *others: Any) -> Tensor:
    if not backend.can_pack(x.dtype):
        return mlp_reference(x, *others)
    norm_weight, norm_bias, *layers, eps = others
    return backend.packed_mlp(x, norm_weight, norm_bias, eps, *layers)


def _linear_flops(x: Sequence[int], packed: Sequence[int], *others: Any) -> int:
    return 2 * math.prod(x) * others[4]


def _mlp_flops(x: Sequence[int], *others: Any) -> int:
    return 4 * math.prod(x) * others[3][0]


PACKED_LINEAR = Operator(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
    "int outputs, float eps, bool relu) -> Tensor",
    linear_reference,
    _linear_forward,
    fake=lambda x, *others: x.new_empty(*x.shape[:-1], others[5]),
    flops=_linear_flops,
)
PACKED_MLP = Operator(
    "packed_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor expand, Tensor expand_bias, Tensor project, "
    "Tensor project_bias, float eps) -> Tensor",
    mlp_reference,
    _mlp_forward,
    fake=lambda x, *_: torch.empty_like(x),
    served_as="packed_linear",
    flops=_mlp_flops,
)


def _check(x: Tensor, given: dict[str, Tensor | None], expected: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} must be {expected[name]} for x of {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be of x's dtype, {x.dtype}, got {tensor.dtype}")
