"""The command ``spatial-mamba``, also available as ``python -m spatial_mamba``."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from . import __doc__ as purpose
from . import __version__


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


HELP = """usage: spatial-mamba COMMAND ...

{purpose}

commands:
{commands}

options:
  -h, --help  show this text
  --version   show the version

example: spatial-mamba predict photo.jpg --checkpoint spatialmamba_tiny.pth (--help after a command lists its options)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or list the commands without importing PyTorch; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for count in (2, 1):
        if command := COMMANDS.get(" ".join(words[:count])):
            function = getattr(import_module(f"spatial_mamba.{command.module}"), command.function)
            return function(words[count:])
    if not words or not {"-h", "--help"}.isdisjoint(words):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
        print(HELP.format(purpose=purpose, commands="\n".join(lines)), end="")
    elif words == ["--version"]:
        print(f"spatial-mamba {__version__}")
    else:
        wrong, known = " ".join(words[:2]), ", ".join(COMMANDS)
        print(f"error: {wrong!r}: no such command; choose from {known}. Images go after predict", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
