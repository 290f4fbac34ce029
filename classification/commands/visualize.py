"""``python -m spatial_mamba.visualize``, see `classification/visualize`."""

import sys

from spatial_mamba.classification.visualize.command import main

if __name__ == "__main__":
    sys.exit(main())
