"""The backend that the tests of the operators use."""

from collections.abc import Iterator

import pytest

from spatial_mamba.kernels import use_backend


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """Run the reference implementations, with which test_backends.py compares the other backends."""
    with use_backend("torch"):
        yield
