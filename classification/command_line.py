"""What the commands for users share: errors in one line, and the options that choose the model they work on."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import timm
import torch

from ..kernels.options import whole_number
from .errors import InputError
from .models.home import with_home
from .models.image_files import ImageFileError
from .models.preprocessing import SMALLEST_SIZE
from .models.trained import TrainedClassifier, load_classifier
from .models.weights import WeightsError

USER_ERRORS = (InputError, WeightsError, ImageFileError)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as every other wrong input is, and knows the home folder in paths, ``~``."""

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse; the shell expands ``~`` only at the start of a word."""
        return argparse.Namespace(**with_home(vars(super().parse_args(args))))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def image_size(text: str) -> int:
    """Type of an option: a side of at least ``SMALLEST_SIZE`` pixels."""
    size = whole_number(text)
    if size < SMALLEST_SIZE:
        raise argparse.ArgumentTypeError(f"must be at least {SMALLEST_SIZE} pixels, got {size}")
    return size


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """Run a command; returns the exit status: 0, or 2 after one line that names what is wrong."""
    try:
        command(argv)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        sys.stdout = None  # else Python would fail to flush it on leaving
        return 141
    return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a model: a checkpoint, or an untrained model by name."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; they tell the variant")
    source.add_argument(
        "--model", choices=timm.list_models("spatial_mamba_*"), help="an untrained model in place of a checkpoint"
    )
    parser.add_argument("--ema", action="store_true", help="take the EMA weights of the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def chosen_model(args: argparse.Namespace) -> TrainedClassifier:
    """The model that ``add_model_options`` describe, in evaluation mode on the device asked for.

    Raises:
        InputError: for options that contradict each other, or a GPU where there is none.
        WeightsError: if the checkpoint cannot be used.
    """
    device = chosen_device(args.device)
    if args.checkpoint is not None:
        classifier = load_classifier(args.checkpoint, ema=args.ema)
    elif args.ema:
        raise InputError("--ema: an untrained model has no EMA weights; give a --checkpoint")
    else:
        torch.manual_seed(0)
        classifier = TrainedClassifier(timm.create_model(args.model).eval())
    classifier.model.to(device)
    return classifier


def chosen_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU where there is one.

    Raises:
        InputError: for a GPU where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no usable GPU here; take auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
