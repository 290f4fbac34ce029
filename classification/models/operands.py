"""Whether operators compute what modules describe, so that they may read the weights instead of calling the modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules
from torch.nn.utils.parametrize import type_before_parametrizations

from ...kernels.backends import plain_eager


def as_operand(x: Tensor, *weights: Any) -> Tensor | None:
    """``x`` in the dtype in which the operator computes with these weights; under autocast, the dtype of autocast.

    None if the modules must be called instead: if a weight is missing, of another type or dtype, or frozen while others
    are trained, since operators compute the gradients of all.
    """
    if not plain_eager(*weights):
        return None
    needed = [tensor.requires_grad for tensor in (x, *weights)]
    if torch.is_grad_enabled() and any(needed) and not all(needed[1:]):
        return None
    dtypes = {tensor.dtype for tensor in (x, *weights)}
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x if len(dtypes) == 1 else None


def has_modified_parts(module: nn.Module, parts: Mapping[str, type[nn.Module]]) -> bool:
    """Whether hooks apply to every module, or a part is modified; ``parts`` gives the type of each by its name."""
    return _has_global_hooks() or any(is_modified(getattr(module, name), kind) for name, kind in parts.items())


def is_modified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module has hooks, has another ``forward``, or is no longer of type ``kind``: wrapped or sharded.

    Parametrised weights (``torch.nn.utils.parametrize``) do not count: reading them gives the right values.
    """
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return True
    if "forward" in module.__dict__:
        return True
    return type(module) is not kind and type_before_parametrizations(module) is not kind


def _has_global_hooks() -> bool:
    """Whether any hook applies to every module, such as one of ``register_module_forward_hook``."""
    every = hooks_of_all_modules
    return bool(
        every._global_forward_pre_hooks
        or every._global_forward_hooks
        or every._global_backward_pre_hooks
        or every._global_backward_hooks
    )


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether this is a linear layer: a 1x1 convolution of stride 1 without padding or groups."""
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def is_downsampling(conv: nn.Conv2d) -> bool:
    """Whether this has the geometry of the convolution in `downsampling`: depthwise 3x3 of stride 2, zero padding."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return geometry == ((3, 3), (2, 2), (1, 1), (1, 1), "zeros") and depthwise
