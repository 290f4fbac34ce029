"""What holds for all tests: Triton's interpreter without a GPU, chosen before Triton is imported, and plain logging."""

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def package_logger() -> None:
    """Let ``caplog`` see the package's records, also after a test whose training took the logger over."""
    logger = logging.getLogger("spatial_mamba")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
