"""``python -m spatial_mamba.export``, see `classification/export`."""

import sys

from spatial_mamba.classification.export.command import main

if __name__ == "__main__":
    sys.exit(main())
