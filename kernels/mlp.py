"""Two linear layers with the exact GELU between them, as in a transformer's MLP."""

from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .registration import Operator
from .tensors import check_tensors, contiguous_as, keep_for_backward, layouts

LAYOUTS = layouts(expand="hidden, dim", expand_bias="hidden", project="outputs, hidden", project_bias="outputs")


def mlp(x: Tensor, expand: Tensor, expand_bias: Tensor, project: Tensor, project_bias: Tensor) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, expand, expand_bias)), project, project_bias)``.

    On CPUs, tokens are processed in tiles, so that activations stay in the cache. The backward pass keeps the inputs
    and, in the dtype of ``x``, the hidden layer before bias and GELU. It computes the activations again; on GPUs one
    kernel does this together with the gradients of GELU and bias.

    Args:
        x: (..., dim).
        expand: (hidden, dim).
        expand_bias: (hidden,).
        project: (outputs, hidden).
        project_bias: (outputs,).

    Returns:
        The result, (..., outputs), contiguous and in the dtype of ``x``.

    Raises:
        ValueError: if shapes or devices do not match.
        TypeError: if a tensor is not of a real floating-point type.
    """
    weights = dict(expand=expand, expand_bias=expand_bias, project=project, project_bias=project_bias)
    dim = check_tensors(LAYOUTS, dict(x=x, **weights))["dim"]
    if x.shape[-1:] != (dim,):
        raise ValueError(f"x must have shape (..., {dim}), got {tuple(x.shape)}")
    converted = [contiguous_as(weight, x.dtype) for weight in weights.values()]
    out = MLP(x.reshape(-1, x.shape[-1]).contiguous(), *converted, keep_for_backward(x, *converted))
    return out.view(*x.shape[:-1], out.shape[1])


def reference(
    x: Tensor, expand: Tensor, expand_bias: Tensor, project: Tensor, project_bias: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """The reference implementation for x (tokens, dim): the outputs, then the hidden layer without its bias."""
    hidden = F.linear(x, expand)
    out = F.linear(F.gelu(hidden + expand_bias), project, project_bias)
    return out, hidden if keep_hidden else hidden[:0]


def _fake(x: Tensor, expand: Tensor, _: Tensor, project: Tensor, __: Tensor, keep_hidden: bool) -> tuple[Tensor, ...]:
    tokens = x.shape[0]
    return x.new_empty(tokens, project.shape[0]), x.new_empty(tokens if keep_hidden else 0, expand.shape[0])


def _backward(backend: ModuleType, grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, expand, expand_bias, project, _, hidden, _ = inputs
    if not len(hidden):  # not kept, as when the operator was traced or exported without gradients
        hidden = F.linear(x, expand)
    return backend.mlp_backward(grad_out, x, expand, expand_bias, project, hidden)


MLP = Operator(
    "mlp(Tensor x, Tensor expand, Tensor expand_bias, Tensor project, Tensor project_bias, bool keep_hidden) "
    "-> (Tensor, Tensor)",
    reference,
    _fake,
    backward=_backward,
    kept=1,
    flops=lambda x, expand, _, project, *__: 2 * x[0] * expand[0] * (expand[1] + project[0]),
)
