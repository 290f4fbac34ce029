"""Count the parameters and FLOPs of configs."""

import sys
from collections.abc import Sequence

import torch

from ..kernels.command_line import Parser, run_command
from ..kernels.errors import UserError
from .command_line import image_size
from .config import load_config
from .models.architecture import VARIANTS
from .models.flops import count_flops, count_parameters
from .trainer import build_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser("spatial-mamba complexity", __doc__, "spatialmamba_tiny --size 384")
    recipes = [f"spatialmamba_{variant}" for variant in VARIANTS]
    parser.add_argument(
        "configs", nargs="*", default=recipes, metavar="CONFIG", help="YAML files, or names of shipped configs"
    )
    parser.add_argument("--size", type=image_size, metavar="N", help="side of the image (default: the config's)")
    args = parser.parse_args(argv)
    configs = [load_config(name)[0] for name in args.configs]
    print(f"{'config':<24}{'size':>6}{'parameters':>14}{'GFLOPs':>10}")
    for config in configs:
        size = args.size or config.DATA.IMG_SIZE
        model = build_model(config, config.MODEL.NUM_CLASSES or 1000)
        try:
            flops = count_flops(model, torch.zeros(1, model.in_chans, size, size))
        except ImportError as error:
            raise UserError(str(error)) from error
        print(f"{config.MODEL.NAME:<24}{size:>6}{count_parameters(model):>14,}{flops / 1e9:>10.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
