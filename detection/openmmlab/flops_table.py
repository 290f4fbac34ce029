"""Print the parameters and FLOPs of complete detectors and segmentors: the ``complexity`` command of both packages.

FLOPs are counted as in the published tables. A multiply-add counts as one; ``classification.models.flops`` lists the
operations that count. The model runs on one image in evaluation mode, in its ``tensor`` mode without post-processing.
For Mask R-CNN this covers backbone, FPN, RPN, the box head on the proposals of the RPN (1,000 in the recipes, at their
size) and the mask head on the first 100 of them. For UPerNet it covers backbone and decode head. The auxiliary head,
which is used only in training, is part of the parameters but not of the FLOPs.
"""

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
from .tools import FOLDERS, load_config


def build_model(config: Config) -> nn.Module:
    """Build the model of a config with its initial values; no weights are read from files."""
    init_default_scope(config.default_scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes for developers of mmseg
        return MODELS.build(config.model)


def count_model_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """FLOPs of a detector or segmentor for one image of ``size`` (height, width), by the convention above.

    Raises:
        ImportError: if fvcore is missing.
    """
    return count_flops(_TensorMode(model, size), torch.zeros(1, 3, *size))


class _TensorMode(nn.Module):
    """A model as a function of the image alone, so that it can be traced."""

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
        recipes: names of the configs to use if none is given.
        size: height and width of the image if none are given.

    Raises:
        UserError: naming a wrong option or config, or fvcore if it is missing.
    """
    parser = Parser(
        f"python -m spatial_mamba.{FOLDERS[package]}.complexity",
        description,
        f"{recipes[0]} --size {size[0]} {size[1]}",
    )
    text = "config files, or names of shipped configs (default: those with published results)"
    parser.add_argument("configs", nargs="*", default=recipes, metavar="CONFIG", help=text)
    text = f"size of the image in pixels (default: {size[0]} {size[1]})"
    parser.add_argument("--size", nargs=2, type=int, default=size, metavar=("HEIGHT", "WIDTH"), help=text)
    args = parser.parse_args(argv)
    size = tuple(args.size)
    if min(size) < SMALLEST_SIZE:
        raise UserError(f"--size: height and width must be at least {SMALLEST_SIZE} pixels, got {size[0]} {size[1]}")
    configs = {name: load_config(package, name) for name in args.configs}
    width = max(map(len, configs)) + 2
    print(f"{'config':<{width}}{'size':>10}{'parameters':>14}{'GFLOPs':>10}")
    for name, config in configs.items():
        torch.manual_seed(0)  # for some image sizes, the number of proposals depends on the initial values
        model = build_model(config)
        try:
            flops = count_model_flops(model, size)
        except ImportError as error:
            raise UserError(str(error)) from error
        shape = f"{size[0]}x{size[1]}"
        print(f"{name:<{width}}{shape:>10}{count_parameters(model):>14,}{flops / 1e9:>10.2f}", flush=True)
