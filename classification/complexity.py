"""Parameters and FLOPs of a config: ``python -m spatial_mamba.classification.complexity --cfg spatialmamba_tiny``."""

import argparse
import sys
from collections.abc import Sequence

import torch

from .config import load_config
from .errors import InputError
from .models.flops import count_flops, count_parameters
from .trainer import build_model


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
            flops = count_flops(model, torch.zeros(1, model.in_chans, size, size))
            print(f"{config.MODEL.NAME:<24}{size:>6}{count_parameters(model):>14,}{flops / 1e9:>10.3f}")
    except (InputError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
