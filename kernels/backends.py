"""Which back end serves which device and dtype: the compiled libraries, Triton, or the definition in PyTorch."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import native

# Fastest first; "torch", the definition, serves everything.
PREFERENCE = {"cpu": ("cpu", "triton", "torch"), "cuda": ("cuda", "triton", "torch")}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
BACKENDS = ("cpu", "cuda", "triton", "torch")
FORCE_VARIABLE = "SPATIAL_MAMBA_BACKEND"
REQUIRE_VARIABLE = "SPATIAL_MAMBA_REQUIRE_NATIVE"


def _why_no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


def _read_force_variable() -> str | None:
    name = os.environ.get(FORCE_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ImportError(f"{FORCE_VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Reasons why a back end cannot be used here; None where it can. Found once, at import, so that compilers see constants.
_missing = {"cpu": native.load("cpu"), "cuda": native.load("cuda"), "triton": _why_no_triton(), "torch": None}
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_forced = _read_force_variable()
_hinted: set[str] = set()


def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why a back end cannot serve tensors of this device type and dtype here, or None if it can."""
    if backend == "torch":
        return None
    if backend not in PREFERENCE.get(device_type, ()):
        return f"the {backend} back end has no kernels for {device_type} tensors"
    if dtype not in DTYPES[backend]:
        return f"the {backend} back end has no kernels for {dtype}"
    if backend == "triton" and device_type == "cpu" and not _interpreted:
        return "Triton runs on the CPU only in its interpreter, for tests: set TRITON_INTERPRET=1"
    return _missing[backend]


def serving(device_type: str, dtype: torch.dtype) -> str:
    """Name of the back end that serves tensors of this device type and dtype: the forced one, or the fastest here.

    Raises:
        RuntimeError: if the forced back end cannot serve them, or native code is required and there is none.
    """
    if _forced is not None:
        reason = why_not(_forced, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"the back end {_forced!r} is forced, but cannot be used: {reason}")
        return _forced
    candidates = PREFERENCE.get(device_type, ("torch",))
    # Interpreted kernels are for tests alone, which force them.
    usable = [name for name in candidates if (name, device_type) != ("triton", "cpu")]
    best = next(name for name in usable if why_not(name, device_type, dtype) is None)
    if best != usable[0] and not torch.compiler.is_compiling():
        _hint(usable[0], best, device_type, dtype)
    return best


def definition_serves(tensor: Tensor) -> bool:
    """Whether operators on this tensor run as the definition in PyTorch, rather than as one native operator."""
    return serving(tensor.device.type, tensor.dtype) == "torch"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one back end within the ``with`` block, for tests and bug reports; process-wide, not per thread.

    The environment variable ``SPATIAL_MAMBA_BACKEND`` does the same for a whole process.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"`` (the definition).

    Raises:
        ValueError: for another name. An operator then raises RuntimeError if the back end cannot serve its tensors.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"the back end must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _hint(better: str, used: str, device_type: str, dtype: torch.dtype) -> None:
    """Say once per device type what would be faster; an error instead if native code is required."""
    reason = why_not(better, device_type, dtype)
    if _missing[better] is None:  # built, but without kernels for this dtype: nothing that the user could build
        return
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        raise RuntimeError(f"{REQUIRE_VARIABLE}=1, but the {better} back end cannot be used: {reason}")
    if device_type not in _hinted:
        _hinted.add(device_type)
        warnings.warn(f"{device_type} operators run on {used!r}; faster is {better!r}: {reason}", stacklevel=2)
