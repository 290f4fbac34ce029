"""What all operators share: the back end that runs one, and the memory layout that back ends take tokens in."""

from types import ModuleType

import torch
from torch import Tensor

from .. import backends, definitions


def backend_of(tensor: Tensor, operator: str) -> ModuleType:
    """What runs ``operator`` on this tensor: functions of the operators' names."""
    capability = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
    name = backends.serving(tensor.device.type, tensor.dtype, capability, operator)
    if name == "torch":
        return definitions
    if name == "triton":
        from .. import triton

        return triton
    return getattr(torch.ops, f"spatial_mamba_{name}")


def at_token_stride(x: Tensor) -> Tensor:
    """Tokens (batch, H, W, dim) as strides (H W s, W s, s, 1): as they are if they are contiguous channels of a wider
    map, else a contiguous copy.
    """
    height, width, dim = x.shape[1:]
    stride = x.stride(2)
    if stride >= dim and x.stride() == (height * width * stride, width * stride, stride, 1):
        return x
    # Flattened because PyTorch leaves strides of axes of length 1 as they come.
    return x.contiguous().flatten().view(x.shape)
