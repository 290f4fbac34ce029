"""Stand-ins for NumPy's types in pickles from elsewhere; what NumPy's own would do with forged data is not known.

NumPy fills arrays and dtypes from a pickle without much checking: a forged dtype makes it take numbers for addresses
of objects, an array filled twice leaves others pointing at freed memory. These take numbers only, of a few formats.
"""

import pickle
from typing import Any, NoReturn

import numpy as np

_CODES = {"?", "b1", *(kind + size for kind in "iuf" for size in "1248")} - {"f1"}


class _Dtype:
    """In place of ``numpy.dtype``: a format of numbers in little-endian order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _CODES:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code!r}")
        self.numpy = np.dtype(code).newbyteorder("<")

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of byte order {state[1]!r}")


class _Array(np.ndarray):
    """In place of ``numpy.ndarray``; saved again it is one."""

    def __new__(cls, *args: object) -> NoReturn:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray as a function")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        if type(dtype) is not _Dtype or type(content) is not bytes:
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray of other things than numbers")
        super().__setstate__((1, shape, dtype.numpy, is_fortran, content))

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """In place of NumPy's function, which makes the empty array that is filled then."""
    if kind is not _Array:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.core.multiarray._reconstruct of another type")
    return np.ndarray.__new__(_Array, (0,))


def _scalar(dtype: _Dtype, content: bytes) -> np.generic:
    """In place of NumPy's function for a single number."""
    if type(dtype) is not _Dtype:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.core.multiarray.scalar of another type")
    return np.frombuffer(content, dtype.numpy, count=1)[0]


def safe_numpy_types() -> list[tuple[Any, str]]:
    """NumPy's scalars and arrays, by the names that the pickles of NumPy 1 and 2 know them by."""
    admitted: list[tuple[Any, str]] = [(_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray")]
    for core in ("core", "_core"):
        admitted.append((_scalar, f"numpy.{core}.multiarray.scalar"))
        admitted.append((_reconstruct, f"numpy.{core}.multiarray._reconstruct"))
    return admitted
