"""Tests a detector: python tools/test.py CONFIG CHECKPOINT; --help lists the options."""

import sys

from spatial_mamba.detection.openmmlab.tools import test

if __name__ == "__main__":
    sys.exit(test("mmdet"))
