"""Counts parameters, and FLOPs of a forward pass with a multiply-add counted as one, as fvcore does."""

import logging
import math

import torch
from torch import Tensor, nn

from ...kernels import use_backend
from ...kernels.selective_scan import SCAN_FLOPS


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of ``model(*inputs)`` in evaluation mode.

    Counted are convolutions, linear layers, matrix products, normalisation and interpolation, and the scan with
    ``SCAN_FLOPS`` per element and state; element-wise operations are not.

    Raises:
        ImportError: if fvcore is missing, with the command that installs it.
        ValueError: for a fused model, whose packed layers fvcore does not know.
    """
    if getattr(model, "fused", False):
        raise ValueError(
            "count the FLOPs of a model before fuse(): afterwards its layers are no longer those of PyTorch"
        )
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("fvcore, which counts FLOPs, is missing: pip install fvcore") from error
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # lists idle drop-path modules otherwise
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.set_op_handle("spatial_mamba::linear_recurrence", _scan_flops)
    analysis.unsupported_ops_warnings(False)
    with torch.no_grad(), use_backend("torch"):  # the definition, in operations that fvcore knows
        return int(analysis.total())


def _scan_flops(inputs: list, outputs: list) -> int:
    return SCAN_FLOPS * math.prod(outputs[0].type().sizes())
