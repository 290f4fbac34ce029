"""Parameters and FLOPs of a config: ``python -m spatial_mamba.classification.complexity --cfg spatialmamba_tiny``."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence

import torch
from torch import nn

from ..kernels import use_backend
from ..kernels.operators import SCAN_FLOPS
from .config import load_config
from .errors import InputError
from .trainer import build_model


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """FLOPs of one forward pass of a (1, *shape) input, a multiply-add counted as one, as fvcore does.

    Raises:
        InputError: if fvcore is missing.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise InputError("fvcore, which counts FLOPs, is missing: pip install fvcore") from error
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # lists idle drop-path modules otherwise
    analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, *shape))
    analysis.set_op_handle("spatial_mamba::linear_recurrence", _scan_flops)
    analysis.unsupported_ops_warnings(False)
    with use_backend("torch"):  # the definition, in operations that fvcore knows
        return int(analysis.total())


def _scan_flops(inputs: list, outputs: list) -> int:
    return SCAN_FLOPS * math.prod(outputs[0].type().sizes())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", nargs="+", required=True, help="YAML configs, or names of those in the package")
    parser.add_argument("--size", type=int, help="image size, if not the config's")
    args = parser.parse_args(argv)
    print(f"{'config':<24}{'size':>6}{'parameters':>14}{'GFLOPs':>10}")
    try:
        for name in args.cfg:
            config, _ = load_config(name)
            size = args.size or config.DATA.IMG_SIZE
            model = build_model(config, config.MODEL.NUM_CLASSES or 1000)
            flops = count_flops(model, (model.in_chans, size, size))
            print(f"{config.MODEL.NAME:<24}{size:>6}{count_parameters(model):>14,}{flops / 1e9:>10.3f}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
