"""Helpers for launches: what to compile for, block sizes, the number of programs to aim for, the device."""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
import triton
from torch import Tensor

PROGRAMS_PER_MULTIPROCESSOR = 4  # where the number of programs can be chosen
# For the interpreter: small enough for short tests to run both the divided and the undivided scan.
INTERPRETED_MULTIPROCESSORS = 2

# By default, Triton compiles a kernel again if an integer is 1 or a multiple of 16. For these, that gains nothing.
kernel = partial(
    triton.jit,
    do_not_specialize=(
        "batch", "height", "width", "rows", "bands", "tiles", "tokens", "projection_channels", "offset_pairs",
    ),
)  # fmt: skip


def block(size: int, limit: int) -> int:
    """The smallest power of two that is at least ``size``, but at most ``limit``, a power of two."""
    return min(1 << (size - 1).bit_length(), limit)


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. ``triton.cdiv`` takes 2 us per call."""
    return -(-a // b)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device_of_first(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Launch the kernels of ``operator`` on the device of its first argument; Triton uses the current device.

    Raises:
        RuntimeError: if Triton cannot compile or launch a kernel; names the operator and a way out.
    """

    @wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        try:
            with torch.cuda.device_of(first):
                return operator(first, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            cause: BaseException = error  # errors of the compiler quote source code, and then name the cause
            while cause.__cause__:
                cause = cause.__cause__
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
            raise RuntimeError(
                f"{operator.__name__} failed in the triton backend on {first.device} ({reason}). "
                "Set SPATIAL_MAMBA_BACKEND=torch to use the reference implementation. "
                "`spatial-mamba kernels check` tests all operators"
            ) from error

    return run
