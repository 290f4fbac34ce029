"""What the command lines of benchmarks share: types of options, and errors in one line."""

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import torch

DTYPES = ("float32", "bfloat16", "float16")
BATCHES = {"cpu": 8, "cuda": 128}  # images, unless the user chooses
SMALLEST = 32  # pixels, the stride of the models


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without the usage, and ends with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def device(self, name: str | None) -> torch.device:
        """The device of that name; by default the GPU where there is one. It is an error to ask for one in vain."""
        if name == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: PyTorch finds no usable GPU here")
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))

    def folder(self, path: Path) -> None:
        """Make the folder for ``--out``. It is an error if nothing can be written there, found before any work."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            self.error(f"--out {path}: cannot be written: {error.strerror}")


def user_path(text: str) -> Path:
    """A path, in which ``~`` is the home folder: the shell expands it only at the start of a word."""
    return Path(os.path.expanduser(text))  # noqa: PTH111, Path.expanduser fails for unknown users


def whole_number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def image_size(text: str) -> int:
    """A side of at least 32 pixels."""
    size = whole_number(text)
    if size < SMALLEST:
        raise argparse.ArgumentTypeError(f"must be at least {SMALLEST} pixels, got {size}")
    return size


def positive(text: str, kind: str = "number") -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a {kind} above 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A finite time above 0."""
    return positive(text, "number of seconds")
