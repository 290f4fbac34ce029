"""What all commands share: the parser, errors in one line, and types of options."""

import argparse
import difflib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from .errors import UserError
from .home import with_home


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a wrong option, and expands ``~`` in paths.

    Args:
        prog: the command, such as ``spatial-mamba export``.
        description: for ``--help``.
        example: what follows the command in an example, which ``--help`` shows last.
        options: of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, description: str | None = None, example: str = "", **options: Any) -> None:
        epilog = f"example: {prog} {example}" if example else None
        super().__init__(prog, description=description, epilog=epilog, **options)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; the shell expands ``~`` only at the start of a word."""
        return argparse.Namespace(**with_home(vars(super().parse_args(args))))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def run_command(command: Callable[..., int | None], *args: Any) -> int:
    """Call ``command(*args)``.

    Returns:
        The exit status: what the command returns, or 0 for None; 2 after one line that names what is wrong.
    """
    try:
        return command(*args) or 0
    except UserError as error:
        # Usually every process finds the same error. The first one reports it, and the launcher stops the others.
        if launched_rank() > 0:
            time.sleep(5)
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        sys.stdout = None  # Python would fail to flush it on exit
        return 141


def print_error(error: Exception) -> None:
    """Print ``error: ...`` as one line on standard error."""
    message = str(error).strip()
    if "Original Traceback (most recent call last)" in message:  # from a loader process: drop it, but not the error
        lines = message.split("Traceback (most recent call last):\n")[-1].splitlines()
        kept = itertools.dropwhile(lambda line: line.startswith(" "), lines)
        message = re.sub(r"^spatial_mamba[\w.]*: ", "", "\n".join(kept))
    print(f"error: {printable(' '.join(message.split())):.2000}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with escapes for control characters, which could change what a terminal shows."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def closest(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """A suggestion for an unknown name, to end a message with; empty if no known name is similar in any case."""
    spelt = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=cutoff)
    return f"; did you mean {spelt[close[0]]}?" if close else ""


def launched_rank() -> int:
    """Rank given by the launcher (torchrun or Slurm); 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def whole_number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value
