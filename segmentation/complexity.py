"""Count the parameters and FLOPs of segmentors."""

import sys
from collections.abc import Sequence

from ..detection.openmmlab.commands import run_command

RECIPES = [f"upernet_spatialmamba_4xb4-160k_ade20k-512x512_{name}" for name in ("tiny", "small", "base")]
SIZE = (512, 2048)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    return run_command("mmseg", "detection.openmmlab.flops_table", "print_table", "mmseg", __doc__, RECIPES, SIZE, argv)


if __name__ == "__main__":
    sys.exit(main())
