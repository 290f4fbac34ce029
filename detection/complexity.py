"""Count the parameters and FLOPs of detectors."""

import sys
from collections.abc import Sequence

from .openmmlab.commands import run_command

RECIPES = [f"mask_rcnn_spatialmamba_fpn_coco_{name}" for name in ("tiny", "small", "base", "tiny_3x", "small_3x")]
SIZE = (800, 1280)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    return run_command("mmdet", "detection.openmmlab.flops_table", "print_table", "mmdet", __doc__, RECIPES, SIZE, argv)


if __name__ == "__main__":
    sys.exit(main())
