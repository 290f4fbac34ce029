"""The command ``spatial-mamba``, also available as ``python -m spatial_mamba``."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from . import __doc__ as purpose
from . import __version__
from .kernels.command_line import Parser, run_command
from .kernels.errors import UserError


class Command(NamedTuple):
    """The help text of a command, and the function that runs it. Its module is imported only when the command runs."""

    help: str
    module: str
    function: str = "main"


COMMANDS = {
    "predict": Command("classify images", "classification.prediction"),
    "train": Command("train on ImageNet or a folder of images", "classification.main", "train"),
    "evaluate": Command("measure the accuracy of a checkpoint", "classification.main", "evaluate"),
    "checkpoint": Command("inspect, convert and verify checkpoint files", "classification.weight_files.command"),
    "export": Command("write ONNX, torch.export and AOTInductor files", "classification.export.command"),
    "visualize": Command("draw states, attention, receptive fields, curves", "classification.visualize.command"),
    "complexity": Command("count parameters and FLOPs of configs", "classification.complexity"),
    "benchmark models": Command("time whole models", "classification.benchmark.__main__"),
    "benchmark loading": Command("time data loading", "classification.benchmark.loading"),
    "benchmark operators": Command("time single operators", "kernels.benchmark.__main__"),
    "kernels": Command("report which backends are used; compile and check them", "kernels.__main__"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for count in (2, 1):
        if command := COMMANDS.get(" ".join(words[:count])):
            function = getattr(import_module(f"spatial_mamba.{command.module}"), command.function)
            return function(words[count:])
    return run_command(_introduce, words)


def _introduce(words: Sequence[str]) -> None:
    """Handle ``--help``, ``--version`` and an empty command line.

    Raises:
        UserError: for anything else.
    """
    width = max(map(len, COMMANDS))
    parser = Parser(
        "spatial-mamba",
        purpose + "\n\ncommands:\n" + "\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items()),
        "predict photo.jpg --checkpoint spatialmamba_tiny.pth (--help after a command lists its options)",
        usage="spatial-mamba COMMAND ...",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spatial-mamba {__version__}")
    _, others = parser.parse_known_args(words)
    if others:
        known = ", ".join(COMMANDS)
        raise UserError(f"{' '.join(others[:2])}: no such command; choose from {known}. Images go after predict")
    parser.print_help()


if __name__ == "__main__":
    sys.exit(main())
