"""``python -m spatial_mamba.checkpoint``, see `classification/weight_files`."""

import sys

from spatial_mamba.classification.weight_files.command import main

if __name__ == "__main__":
    sys.exit(main())
