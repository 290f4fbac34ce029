"""LayerNorm times the SiLU of a gate: the public function, and its definition in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import require_float, require_same_device
from .precision import without_autocast


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``layer_norm(y, weight, bias) * silu(gate)``, normalised over the channels of each token.

    Computed in float32 (float64 for a float64 gate), also under autocast, and rounded once. The backward pass keeps
    the inputs alone.

    Args:
        y: (batch, H, W, dim), also in a wider dtype than the gate: it need not be rounded before.
        gate: (batch, H, W, dim). Channels of a wider map, ``wide[..., a:b]``, are read where they are.
        weight: (dim,).
        bias: (dim,).
        eps: added to the variance.

    Returns:
        The result, (batch, H, W, dim), contiguous and in the dtype of ``gate``.

    Raises:
        ValueError: if shapes or devices do not fit together.
        TypeError: for a tensor that is not of a floating-point type.
    """
    _check_arguments(y, gate, weight, bias)
    compute_dtype = torch.promote_types(gate.dtype, torch.float32)

    with without_autocast(gate):
        weight, bias = weight.to(compute_dtype), bias.to(compute_dtype)
        if backends.definition_serves(gate, "gated_norm"):
            return gated_norm_definition(y, gate, weight, bias, eps)
        y = (y if y.dtype == gate.dtype else y.to(compute_dtype)).contiguous()
        return torch.ops.spatial_mamba.gated_norm(y, gate, weight.contiguous(), bias.contiguous(), eps)


def gated_norm_definition(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition; arguments and result as above, weights in the compute dtype."""
    normed = F.layer_norm(y.to(weight.dtype), weight.shape, weight, bias, eps)
    return (normed * F.silu(gate.to(weight.dtype))).to(gate.dtype)


def _check_arguments(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> None:
    if y.ndim != 4 or 0 in y.shape[1:]:
        raise ValueError(f"y must be (batch, H, W, dim), none but batch zero, got {tuple(y.shape)}")
    if gate.shape != y.shape:
        raise ValueError(f"gate must be of the shape of y, {tuple(y.shape)}, got {tuple(gate.shape)}")
    dim = y.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (dim,):
            raise ValueError(f"{name} must be (dim,) = {(dim,)}, got {tuple(tensor.shape)}")
    tensors = dict(y=y, gate=gate, weight=weight, bias=bias)
    require_float(tensors)
    require_same_device(tensors)
