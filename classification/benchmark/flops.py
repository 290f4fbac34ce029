"""Floating-point operations of a forward pass, by one counter for all models, a multiply-add counted as two."""

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ...kernels import use_backend
from ...kernels.selective_scan import SCAN_FLOPS


def forward_flops(model: nn.Module, resolution: int) -> int:
    """FLOPs of one image (3, resolution, resolution): convolutions, matrix products and the scan.

    Nothing is computed: shapes alone are passed through the model, which is left in the mode that it is in.

    Raises:
        Exception: whatever the model objects to the resolution with.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.spatial_mamba.linear_recurrence: _scan_flops})
    image = torch.empty(1, 3, resolution, resolution)
    was_training = model.training
    model.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter, torch.no_grad(), use_backend("torch"):
            model(fake.from_tensor(image))  # by the definition, in operations that the counter knows
    finally:
        model.train(was_training)
    return counter.get_total_flops()


def _scan_flops(*_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
    return SCAN_FLOPS * math.prod(out_shape)
