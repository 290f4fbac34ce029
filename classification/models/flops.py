"""Counts parameters, and FLOPs of a forward pass with fvcore, where a multiply-add counts as one."""

import logging
import math

import torch
from torch import Tensor, nn

from ...kernels import use_backend
from ...kernels.selective_scan import SCAN_FLOPS


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of ``model(*inputs)`` in evaluation mode.

    This counts convolutions, linear layers, matrix products, normalisation, interpolation, and the scan with
    ``SCAN_FLOPS`` per element and state. It does not count element-wise operations.

    Raises:
        ImportError: if fvcore is missing, with the command that installs it.
        ValueError: for a fused model, whose packed layers fvcore does not know.
    """
    if getattr(model, "fused", False):
        raise ValueError("count the FLOPs of a model before fuse(): fvcore does not know the packed layers")
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("fvcore, which counts FLOPs, is missing: pip install fvcore") from error
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # it would list the unused modules
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.set_op_handle("spatial_mamba::linear_recurrence", _scan_flops)
    analysis.unsupported_ops_warnings(False)
    with torch.no_grad(), use_backend("torch"):  # its operations are those that fvcore knows
        return int(analysis.total())


def _scan_flops(inputs: list, outputs: list) -> int:
    return SCAN_FLOPS * math.prod(outputs[0].type().sizes())
