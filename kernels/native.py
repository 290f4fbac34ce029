"""Find, check and load the compiled libraries of this package."""

from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"
BUILD_COMMAND = "python -m spatial_mamba.kernels build"


def load(name: str) -> str | None:
    """Load the library ``"cpu"`` or ``"cuda"``; None, or the reason why it cannot be loaded."""
    library = LIBRARY_FOLDER / f"{name}.so"
    if not library.exists():
        return f"not built: {BUILD_COMMAND} {name}"
    torch.ops.load_library(library)
    return None
