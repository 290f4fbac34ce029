"""Labels the pixels of images: ``python -m spatial_mamba.segmentation IMAGE ... --config CONFIG --checkpoint FILE``."""

import sys
from collections.abc import Sequence

from ..detection.openmmlab.commands import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command("mmseg", "segmentation.prediction", "main", argv)


if __name__ == "__main__":
    sys.exit(main())
