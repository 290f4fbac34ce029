"""Set-up for all tests: Triton's interpreter if there is no GPU, selected before Triton is imported; plain logging."""

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def package_logger() -> None:
    """Let ``caplog`` see the package's records, even after a test in which training has set up the logger."""
    logger = logging.getLogger("spatial_mamba")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
