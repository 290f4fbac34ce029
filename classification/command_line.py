"""The options that choose the model and device of a command."""

import argparse
from pathlib import Path

import timm
import torch

from ..kernels.command_line import whole_number
from ..kernels.errors import UserError
from .models.preprocessing import SMALLEST_SIZE
from .models.trained import TrainedClassifier, load_classifier, untrained_classifier


def image_size(text: str) -> int:
    """Type of an option: a side of at least ``SMALLEST_SIZE`` pixels."""
    size = whole_number(text)
    if size < SMALLEST_SIZE:
        raise argparse.ArgumentTypeError(f"must be at least {SMALLEST_SIZE} pixels, got {size}")
    return size


def add_model_options(parser: argparse.ArgumentParser, untrained: bool = True) -> None:
    """Add the options of ``chosen_model``: a checkpoint or, if ``untrained``, a model by name; EMA weights; device."""
    source = parser.add_mutually_exclusive_group(required=True) if untrained else parser
    source.add_argument(
        "--checkpoint", type=Path, required=not untrained, metavar="FILE", help="weights, which determine the variant"
    )
    if untrained:
        names = timm.list_models("spatial_mamba_*")
        source.add_argument("--model", choices=names, help="an untrained model instead of a checkpoint")
    parser.add_argument("--ema", action="store_true", help="use the EMA weights of the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def chosen_model(args: argparse.Namespace) -> TrainedClassifier:
    """The model chosen by the options of ``add_model_options``, in evaluation mode on its device.

    Raises:
        UserError: for options that contradict each other, a GPU that is not there, or an unusable checkpoint.
    """
    device = chosen_device(args.device)
    if args.checkpoint is not None:
        classifier = load_classifier(args.checkpoint, ema=args.ema)
    elif args.ema:
        raise UserError("--ema: an untrained model has no EMA weights; give a --checkpoint")
    else:
        classifier = untrained_classifier(args.model)
    classifier.model.to(device)
    return classifier


def chosen_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU if there is one.

    Raises:
        UserError: for a GPU if there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no usable GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
