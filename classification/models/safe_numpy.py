"""Stand-ins for NumPy's types in untrusted pickles.

NumPy's own types barely check what a pickle puts into them: a forged dtype makes NumPy treat numbers as addresses of
objects, and filling an array twice leaves others with freed memory. The stand-ins accept numbers in a few formats only.
"""

import pickle
from typing import Any, NoReturn

import numpy as np

_CODES = {"?", "b1", *(kind + size for kind in "iuf" for size in "1248")} - {"f1"}


class _Dtype:
    """Stands in for ``numpy.dtype``: a format of little-endian numbers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _CODES:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code!r}")
        self.numpy = np.dtype(code).newbyteorder("<")

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of byte order {state[1]!r}")


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray``, and is pickled as one."""

    def __new__(cls, *args: object) -> NoReturn:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray as a function")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        if type(dtype) is not _Dtype or type(content) is not bytes:
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray of anything but numbers")
        super().__setstate__((1, shape, dtype.numpy, is_fortran, content))

    def __reduce__(self) -> str | tuple:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """Stands in for NumPy's function, which makes the empty array to be filled."""
    if kind is not _Array:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.core.multiarray._reconstruct of another type")
    return np.empty(0).view(_Array)


def _scalar(dtype: _Dtype, content: bytes) -> np.generic:
    """Stands in for NumPy's function that makes a single number."""
    if type(dtype) is not _Dtype:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.core.multiarray.scalar of another type")
    return np.frombuffer(content, dtype.numpy, count=1)[0]


def safe_numpy_types() -> list[tuple[Any, str]]:
    """Stand-ins for NumPy's scalars and arrays, with their names in pickles of NumPy 1 and 2."""
    allowed: list[tuple[Any, str]] = [(_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray")]
    for core in ("core", "_core"):
        allowed.append((_scalar, f"numpy.{core}.multiarray.scalar"))
        allowed.append((_reconstruct, f"numpy.{core}.multiarray._reconstruct"))
    return allowed
