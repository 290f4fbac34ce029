"""``python -m spatial_mamba``, see `classification/prediction.py`."""

import sys

from spatial_mamba.classification.prediction import main

if __name__ == "__main__":
    sys.exit(main())
