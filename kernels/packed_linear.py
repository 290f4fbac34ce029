"""Linear layers for inference on CPUs: packed weights, fused with the operations before and after the layer.

Weights are stored in the order in which oneDNN's microkernels read them. There are no gradients.
"""

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .downsampling import DOWNSAMPLING_TENSORS
from .downsampling import fake as fake_downsampling
from .downsampling import flops as downsampling_flops
from .downsampling import reference as downsample
from .registration import Operator
from .tensors import Layouts, check_tensors, layouts

COLUMNS = 64  # outputs per block, as in csrc/cpu/packing.h
LINEAR_LAYOUTS = layouts(packed=f"blocks, inputs, {COLUMNS}", bias="outputs", norm_weight="inputs", norm_bias="inputs")
MLP_LAYOUTS = layouts(
    norm_weight="dim",
    norm_bias="dim",
    expand=f"hidden_blocks, dim, {COLUMNS}",
    expand_bias="hidden",
    project=f"dim_blocks, hidden, {COLUMNS}",
    project_bias="dim",
)
DOWNSAMPLING_LAYOUTS = layouts(
    x="batch, H, W, dim",
    expand=f"hidden_blocks, dim, {COLUMNS}",
    expand_bias="hidden",
    conv_weight="hidden, 1, 3, 3",
    conv_bias="hidden",
    project=f"output_blocks, hidden, {COLUMNS}",
    project_bias="outputs",
)


def can_pack(weight: Tensor) -> bool:
    """Whether the cpu backend serves packed layers with a weight (outputs, inputs) like this one."""
    return (
        weight.device.type == "cpu"
        and weight.shape[1] % _inputs_per_row(weight.dtype) == 0
        and backends.module_for(weight, "packed_linear") is not None
        and torch.ops.spatial_mamba_cpu.can_pack(weight.dtype)
    )


def pack_weight(weight: Tensor) -> Tensor:
    """Pack the weight of a linear layer.

    Args:
        weight: (outputs, inputs), for which `can_pack` is true.

    Returns:
        (ceil(outputs / 64), inputs, 64): blocks of outputs, the last padded with zeros. In half precision, inputs are
        stored in pairs.

    Raises:
        ValueError: if it cannot be packed here.
    """
    if not can_pack(weight):
        what = f"a weight of {tuple(weight.shape)}, {weight.dtype}, on {weight.device}"
        raise ValueError(f"{what} cannot be packed here: use it unpacked")
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
    """``relu(linear(layer_norm(x)))`` or ``linear(layer_norm(x)) + residual``; only the linear layer is required.

    Args:
        x: (..., inputs). All other tensors must have its dtype.
        packed: from `pack_weight`.
        outputs: number of outputs of the layer.
        bias: (outputs,).
        norm_weight, norm_bias: (inputs,), both or neither.
        eps: added to the variance.
        relu: whether to apply ReLU.
        residual: (..., outputs), not with ``relu``.

    Returns:
        (..., outputs).

    Raises:
        ValueError: if shapes or devices do not match, or if arguments are combined that exclude each other.
        TypeError: if dtypes differ.
    """
    tensors = dict(packed=packed, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    _check(LINEAR_LAYOUTS, x, tensors, inputs=x.shape[-1], outputs=outputs, blocks=-(-outputs // COLUMNS))
    if residual is not None and residual.shape != (*x.shape[:-1], outputs):
        raise ValueError(f"residual must have shape {(*x.shape[:-1], outputs)}, got {tuple(residual.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("give both norm_weight and norm_bias, or neither")
    if relu and residual is not None:
        raise ValueError("give relu or a residual, not both")
    contiguous = (None if tensor is None else tensor.contiguous() for tensor in tensors.values())
    return PACKED_LINEAR(x.contiguous(), *contiguous, outputs, eps, relu)


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
    """``x + linear(gelu(linear(layer_norm(x))))``; the hidden activations stay in the cache.

    Args:
        x: (..., dim). All other tensors must have its dtype.
        norm_weight, norm_bias: (dim,).
        eps: added to the variance.
        expand, project: from `pack_weight`, of weights (hidden, dim) and (dim, hidden).
        expand_bias, project_bias: (hidden,) and (dim,).

    Returns:
        A tensor of the shape of ``x``.

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if dtypes differ.
    """
    tensors = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        expand=expand,
        expand_bias=expand_bias,
        project=project,
        project_bias=project_bias,
    )
    dim, hidden = x.shape[-1], len(expand_bias)
    blocks = dict(dim_blocks=-(-dim // COLUMNS), hidden_blocks=-(-hidden // COLUMNS))
    _check(MLP_LAYOUTS, x, tensors, dim=dim, hidden=hidden, **blocks)
    return PACKED_MLP(x.contiguous(), *(tensor.contiguous() for tensor in tensors.values()), eps)


def packed_downsampling(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """`downsampling` with packed weights; a band of rows of the hidden map stays in the cache.

    Args:
        x: (batch, H, W, dim). All other tensors must have its dtype.
        expand, project: from `pack_weight`, of weights (hidden, dim) and (outputs, hidden).
        expand_bias, project_bias: (hidden,) and (outputs,).
        conv_weight, conv_bias: (hidden, 1, 3, 3) and (hidden,).

    Returns:
        (batch, ceil(H / 2), ceil(W / 2), outputs).

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if dtypes differ.
    """
    tensors = dict(
        expand=expand,
        expand_bias=expand_bias,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        project=project,
        project_bias=project_bias,
    )
    hidden, outputs = len(expand_bias), len(project_bias)
    blocks = dict(hidden_blocks=-(-hidden // COLUMNS), output_blocks=-(-outputs // COLUMNS))
    _check(DOWNSAMPLING_LAYOUTS, x, tensors, hidden=hidden, outputs=outputs, **blocks)
    tensors |= dict(conv_weight=conv_weight.float(), conv_bias=conv_bias.float())
    return PACKED_DOWNSAMPLING(x.contiguous(), *(tensor.contiguous() for tensor in tensors.values()))


def _check(expected: Layouts, x: Tensor, tensors: Mapping[str, Tensor | None], **sizes: int) -> None:
    check_tensors(expected, {"x": x, **tensors}, **sizes)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


def unpack_weight(packed: Tensor, outputs: int) -> Tensor:
    """Undo `pack_weight`: return the original weight, (outputs, inputs)."""
    pair = _inputs_per_row(packed.dtype)
    blocks, inputs, columns = packed.shape
    pairs = packed.view(blocks, inputs // pair, columns, pair)
    return pairs.permute(0, 2, 1, 3).reshape(blocks * columns, inputs)[:outputs].contiguous()


def _inputs_per_row(dtype: torch.dtype) -> int:
    """How many inputs are stored side by side: processors multiply half-precision values in pairs."""
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


def downsampling_reference(x: Tensor, expand: Tensor, expand_bias: Tensor, *others: Tensor) -> Tensor:
    """The reference implementation of `packed_downsampling`; the convolution is in float32."""
    conv_weight, conv_bias, project, project_bias = others
    expand, project = unpack_weight(expand, len(expand_bias)), unpack_weight(project, len(project_bias))
    return downsample(x, expand, expand_bias, conv_weight, conv_bias, project, project_bias)


def _packed_on(name: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The backend's function; the reference implementation for a model that was packed on another machine."""

    def forward(backend: ModuleType, x: Tensor, *others: Any) -> Tensor:
        return (getattr(backend, name) if backend.can_pack(x.dtype) else reference)(x, *others)

    return forward


PACKED_LINEAR = Operator(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
    "int outputs, float eps, bool relu) -> Tensor",
    linear_reference,
    fake=lambda x, *others: x.new_empty(*x.shape[:-1], others[5]),
    forward=_packed_on("packed_linear", linear_reference),
    differentiable=False,
    flops=lambda x, *others: 2 * math.prod(x) * others[5],
)
PACKED_MLP = Operator(
    "packed_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor expand, Tensor expand_bias, Tensor project, "
    "Tensor project_bias, float eps) -> Tensor",
    mlp_reference,
    fake=lambda x, *_: torch.empty_like(x),
    forward=_packed_on("packed_mlp", mlp_reference),
    differentiable=False,
    served_as="packed_linear",
    flops=lambda x, *others: 4 * math.prod(x) * others[3][0],
)
PACKED_DOWNSAMPLING = Operator(
    f"packed_downsampling({DOWNSAMPLING_TENSORS}) -> Tensor",
    downsampling_reference,
    fake=fake_downsampling,
    forward=_packed_on("packed_downsampling", downsampling_reference),
    differentiable=False,
    served_as="packed_linear",
    flops=lambda x, *weights: downsampling_flops(x, weights[1][0], weights[-1][0]),
)
