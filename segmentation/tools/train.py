"""Trains a segmentor: python tools/train.py CONFIG; --help lists the options."""

import sys

from spatial_mamba.detection.openmmlab.tools import train

if __name__ == "__main__":
    sys.exit(train("mmseg"))
