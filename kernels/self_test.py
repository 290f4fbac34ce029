"""Compare every operator of every backend that can be used here, forward and backward, with float64.

The operators for packed weights are left to the tests.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from . import backends, failures
from .benchmark import implementations
from .benchmark.cases import Case
from .errors import UserError

# Sizes that no block size divides, images smaller than the reach of the fusion, and several blocks along each axis.
CASES = [
    Case("small", "core", batch=2, height=5, width=7, dim=36, rank=3),
    Case("one row", "core", batch=1, height=1, width=3, dim=8, rank=1),
    Case("large", "core", batch=1, height=37, width=41, dim=72, rank=3),
    Case("states", "states", batch=2, height=11, width=13, dim=20),
    Case("N 3", "scan", batch=2, height=1, width=129, dim=12, d_state=3),
    Case("N 16", "scan", batch=1, height=1, width=2051, dim=6, d_state=16),
    Case("small", "fusion", batch=2, height=5, width=6, dim=35),
    Case("small", "mixer", batch=2, height=7, width=6, dim=70, rank=3),
    Case("silu", "conv", batch=2, height=13, width=10, dim=70),
    Case("one row", "conv", batch=1, height=1, width=3, dim=8),
    Case("residual", "position", batch=2, height=19, width=21, dim=35),
    Case("odd sizes", "downsampling", batch=2, height=7, width=6, dim=20),
    Case("one row", "downsampling", batch=1, height=1, width=3, dim=8),
    Case("many tokens", "downsampling", batch=3, height=37, width=41, dim=50),
    Case("small", "mlp", batch=2, height=5, width=7, dim=36),
    Case("many tokens", "mlp", batch=3, height=37, width=41, dim=20),
    Case("small", "norm", batch=2, height=7, width=31, dim=150),
    Case("small", "layer", batch=2, height=7, width=31, dim=150),
]
# Relative to the largest magnitude. Weights, and so their gradients, are in float32 at most.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3, "float64": 1e-7}
ROUNDING_WITHIN = ("downsampling", "mixer", "mlp")  # operators that round tokens between their parts
ROUNDING_FACTOR = 4  # times the tolerance for these


def check(device: torch.device, names: Sequence[str] = (), dtypes: Sequence[str] = ()) -> bool:
    """Print one line per backend, dtype and operator, and go on after errors.

    A backend that fails is recorded: it is no longer chosen for this dtype on this device, until it passes the test or
    is another version.

    On a GPU, each backend and dtype has its own process: Triton compiles in parallel, and a failed launch, after which
    a process cannot use the GPU, does not affect the others.

    Args:
        device: the device that the operators run on; the reference implementation runs on the CPU.
        names: the backends to check, which must be usable; by default the usable ones.
        dtypes: by default those of each backend.

    Returns:
        Whether all results are right.

    Raises:
        UserError: if the device is absent, or none of the backends can be used by default.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no usable GPU; use --device cpu")
    backends.ignore_failures()
    chosen: list[tuple[str, str]] = []
    unusable: dict[str, None] = {}
    for name in names or backends.PREFERENCE[device.type][:-1]:
        served = [str(dtype).removeprefix("torch.") for dtype in backends.DTYPES.get(name, ())] or list(TOLERANCES)
        for dtype in dtypes or served:
            if reason := implementations.why_not(name, device, getattr(torch, dtype)):
                unusable[f"{name:<8}not checked: {reason}"] = None
            else:
                chosen.append((name, dtype))
    print(*unusable, sep="\n", end="\n" if unusable else "")
    if not chosen and not names:
        raise UserError(f"there is nothing to check: only the reference implementation can be used on {device.type}")
    if device.type == "cuda" and len(chosen) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            right = list(pool.map(lambda each: _check_in_process(device, *each), chosen))
    else:
        right = [_check_operators(device, *each) for each in chosen]
    return all(right) and not (names and unusable)


def _check_in_process(device: torch.device, backend: str, dtype: str) -> bool:
    options = ("--device", str(device), "--backend", backend, "--dtype", dtype)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}", "check", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    crashed = done.returncode not in (0, 1)
    crash = f"{backend:<8}{dtype:<10}crashed: exit status {done.returncode}\n" if crashed else ""
    print(done.stdout + crash, end="", flush=True)
    if crashed:
        _record(device, backend, dtype, failed=True)
    return done.returncode == 0


def _check_operators(device: torch.device, backend: str, dtype: str) -> bool:
    cases: dict[str, list[Case]] = {}
    for case in CASES:
        if implementations.has_kernels(backend, case.operator):
            cases.setdefault(implementations.function_name(case.operator), []).append(case)
    right = True
    for operator, several in cases.items():
        errors, wrong = [], []
        for case in several:
            tolerance = TOLERANCES[dtype] * (ROUNDING_FACTOR if case.operator in ROUNDING_WITHIN else 1)
            try:
                error, where = _worst_error(case, device, backend, dtype)
            except Exception as failure:  # the others are still checked
                wrong.append(f"{case.name}: {type(failure).__name__}: {' '.join(str(failure).split()):.500}")
            else:
                errors.append(error)
                if error > tolerance:
                    wrong.append(f"{case.name}: error of {where} is {error:.1e}, above {tolerance:.1e}")
        verdict = f"WRONG: {'; '.join(wrong)}" if wrong else f"right, largest error {max(errors):.1e}"
        print(f"{backend:<8}{dtype:<10}{operator:<22}{verdict}", flush=True)
        right &= not wrong
    _record(device, backend, dtype, failed=not right)
    return right


def _record(device: torch.device, backend: str, dtype: str, failed: bool) -> None:
    if backend == "torch":  # serves where no other backend does
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        failures.record(failures.name_of(backend, getattr(torch, dtype), device.type, capability), backend, failed)
    except OSError as error:
        print(f"{backend:<8}{dtype:<10}cannot be recorded: {error}", flush=True)
        return
    if failed:
        print(f"{backend:<8}{dtype:<10}no longer chosen on this device, as recorded in {failures.folder()}", flush=True)


def _worst_error(case: Case, device: torch.device, backend: str, dtype: str) -> tuple[float, str]:
    # Everything else runs on the CPU, so that compute-sanitizer does not spend time on PyTorch's kernels.
    comparison = implementations.Check(case, device, getattr(torch, dtype), compared_on=torch.device("cpu"))
    function = implementations.OPERATORS[case.operator]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # of the reference implementation
        return comparison.worst(implementations.Implementation(backend, function, backend), backward=True)
