"""Linear layers of a model's inference form: weights in the order in which matrix units read them, and what lies
before and behind a layer done while its tokens are in the cache.

For CPUs: elsewhere libraries' linear layers under `torch.compile` serve. There are no gradients.
"""

import torch
from torch import Tensor

from . import backends
from .packing import COLUMNS, inputs_per_row

__all__ = ["can_pack", "pack_weight", "packed_linear", "packed_mlp"]


def can_pack(weight: Tensor) -> bool:
    """Whether a weight (outputs, inputs) can be packed here: on this device, for its dtype and its number of inputs."""
    return (
        weight.device.type == "cpu"
        and weight.shape[1] % inputs_per_row(weight.dtype) == 0
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
    return torch.ops.spatial_mamba.packed_linear(
        x.contiguous(), packed.contiguous(), outputs, bias, norm_weight, norm_bias, eps, relu, residual
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
    norm = (norm_weight.contiguous(), norm_bias.contiguous(), eps)
    layers = (tensor.contiguous() for tensor in (expand, expand_bias, project, project_bias))
    return torch.ops.spatial_mamba.packed_mlp(x.contiguous(), *norm, *layers)


def _check(x: Tensor, given: dict[str, Tensor | None], expected: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} must be {expected[name]} for x of {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be of x's dtype, {x.dtype}, got {tensor.dtype}")
