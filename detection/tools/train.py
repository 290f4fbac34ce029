"""Trains a detector: python tools/train.py CONFIG; --help lists the options."""

import sys

from spatial_mamba.detection.openmmlab.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("mmdet", "detection.openmmlab.tools", "train", "mmdet"))
