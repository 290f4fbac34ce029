"""The order of packed weights: (blocks of outputs, inputs, 64), as csrc/cpu/packed_linear.cpp reads them."""

import torch
from torch import Tensor

COLUMNS = 64  # outputs per block


def inputs_per_row(dtype: torch.dtype) -> int:
    """How many inputs lie side by side: matrix units take half-precision values in pairs."""
    return 2 if dtype.itemsize == 2 else 1


def unpack_weight(packed: Tensor, outputs: int) -> Tensor:
    """The weight (outputs, inputs) that `pack_weight` made ``packed`` of."""
    pair = inputs_per_row(packed.dtype)
    blocks, inputs, columns = packed.shape
    pairs = packed.view(blocks, inputs // pair, columns, pair)
    return pairs.permute(0, 2, 1, 3).reshape(blocks * columns, inputs)[:outputs].contiguous()
