"""What all launches share: block sizes, the number of programs to aim at, the device."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

PROGRAMS_PER_MULTIPROCESSOR = 4  # where the number of programs is a matter of choice
# In the interpreter, a number that lets short tests reach both the divided and the undivided scan.
INTERPRETED_MULTIPROCESSORS = 2


def block(size: int, limit: int) -> int:
    """The power of two that holds ``size``, or ``limit``, a power of two, if that is less."""
    return min(1 << (size - 1).bit_length(), limit) if size > 0 else 1


def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device_of_first(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Launch the kernels of ``operator`` on the device of its first argument: Triton takes the current one."""

    @wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return operator(first, *rest)

    return run
