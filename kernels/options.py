"""Types of command-line options."""

import argparse
import math
import os
from pathlib import Path


def user_path(text: str) -> Path:
    """A path, in which ``~`` is the home folder: the shell expands it only at the start of a word."""
    return Path(os.path.expanduser(text))  # noqa: PTH111, Path.expanduser fails for unknown users


def whole_number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


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
