"""Parameters and FLOPs of whole detectors and segmentors, as a table; the command line of both rooms.

The convention is that of the published tables. A multiply-add counts as one, and what is counted is what
``classification.models.flops`` names. The whole model is counted in evaluation mode, as its ``tensor`` mode runs
it on one image, without post-processing. For Mask R-CNN that is backbone, FPN, RPN, the box head on the proposals of
the RPN (1,000 in the recipes, at their size) and the mask head on the first 100 of them; for UPerNet backbone and
decode head. The auxiliary head, which only trains, is in the parameters and not in the FLOPs.
"""

import argparse
import warnings
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ...classification.models.flops import count_flops, count_parameters
from ...classification.models.preprocessing import SMALLEST_SIZE
from ...kernels.errors import UserError
from .commands import Parser
from .tools import load_config


def build_model(config: Config) -> nn.Module:
    """The model of a config with the initial values of its layers; no file of weights is read."""
    init_default_scope(config.default_scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of mmseg's developers to each other
        return MODELS.build(config.model)


def count_model_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """FLOPs of a detector or segmentor for one image of ``size`` (height, width), counted as said above.

    Raises:
        ImportError: if fvcore is missing.
    """
    return count_flops(_TensorMode(model, size), torch.zeros(1, 3, *size))


class _TensorMode(nn.Module):
    """A model as a function of the image alone, which is what can be traced."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.samples = [BaseDataElement(metainfo=dict(img_shape=size))]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model(images, self.samples, mode="tensor")


def print_table(
    package: str, description: str, recipes: Sequence[str], size: tuple[int, int], argv: Sequence[str] | None
) -> None:
    """Print one line per config.

    Args:
        package: ``mmdet`` or ``mmseg``.
        recipes: names of the configs that are counted if none is given.
        size: height and width of the image, if none are given.

    Raises:
        UserError: naming a wrong option or config, or fvcore if it is missing.
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "configs", nargs="*", default=recipes, metavar="CONFIG", help="config files, or names of those in the package"
    )
    parser.add_argument("--size", nargs=2, type=int, default=size, metavar=("HEIGHT", "WIDTH"), help="image, in pixels")
    args = parser.parse_args(argv)
    size = tuple(args.size)
    if min(size) < SMALLEST_SIZE:
        raise UserError(f"--size: height and width must be at least {SMALLEST_SIZE} pixels, got {size[0]} {size[1]}")
    configs = {name: load_config(package, name) for name in args.configs}
    width = max(map(len, configs)) + 2
    print(f"{'config':<{width}}{'size':>10}{'parameters':>14}{'GFLOPs':>10}")
    for name, config in configs.items():
        torch.manual_seed(0)  # how many proposals survive depends, if on few images only, on the initial values
        model = build_model(config)
        try:
            flops = count_model_flops(model, size)
        except ImportError as error:
            raise UserError(str(error)) from error
        shape = f"{size[0]}x{size[1]}"
        print(f"{name:<{width}}{shape:>10}{count_parameters(model):>14,}{flops / 1e9:>10.2f}", flush=True)
