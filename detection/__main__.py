"""Detects objects in images: ``python -m spatial_mamba.detection IMAGE ... --config CONFIG --checkpoint FILE``."""

import sys
from collections.abc import Sequence

from .openmmlab.commands import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command("mmdet", "detection.prediction", "main", argv)


if __name__ == "__main__":
    sys.exit(main())
