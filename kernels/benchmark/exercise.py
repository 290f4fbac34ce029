"""Run every operator once, forward and backward, on small odd shapes, for ``compute-sanitizer``.

``python -m spatial_mamba.kernels.benchmark.exercise cuda triton`` also compares the results with float64.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

import torch

from .. import backends
from . import implementations
from .cases import Case

# Sizes that no block size divides, images smaller than the reach of the fusion, and several blocks along each axis.
SHAPES = [
    Case("core, small", "core", batch=2, height=5, width=7, dim=36, rank=3),
    Case("core, one row", "core", batch=1, height=1, width=3, dim=8, rank=1),
    Case("core, large", "core", batch=1, height=37, width=41, dim=72, rank=5),
    Case("states", "states", batch=2, height=11, width=13, dim=20),
    Case("scan, N 3", "scan", batch=2, height=1, width=129, dim=12, d_state=3),
    Case("scan, N 16", "scan", batch=1, height=1, width=2051, dim=6, d_state=16),
    Case("fusion", "fusion", batch=2, height=13, width=6, dim=35),
    Case("mixer", "mixer", batch=2, height=9, width=11, dim=36, rank=3),
    Case("conv", "conv", batch=2, height=13, width=10, dim=70),
    Case("conv, one row", "conv", batch=1, height=1, width=3, dim=8),
    Case("position", "position", batch=2, height=19, width=21, dim=35),
    Case("norm", "norm", batch=2, height=7, width=31, dim=150),
]
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}  # relative to the largest magnitude
MIXER_FACTOR = 4  # times the tolerance, since the mixer rounds tokens between its parts


def main(argv: Sequence[str] | None = None) -> int:
    """Exercise backends.

    Returns:
        The exit status: 0, 1 if a backend is absent or wrong, or 2 without a GPU to use.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="+", choices=backends.BACKENDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCES), default=list(TOLERANCES))
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no usable GPU; use --device cpu", file=sys.stderr)
        return 2
    device, status = torch.device(args.device), 0
    for backend, dtype in itertools.product(args.backends, args.dtype):
        cases = [case for case in SHAPES if implementations.has_kernels(backend, case)]
        reason = implementations.why_not(backend, device, getattr(torch, dtype))
        wrong = reason or "; ".join(filter(None, (_wrong(case, backend, device, dtype) for case in cases)))
        print(f"{backend}, {dtype}: {wrong or f'{len(cases)} cases within tolerance'}", flush=True)
        status |= bool(wrong)
    return status


def _wrong(case: Case, backend: str, device: torch.device, dtype: str) -> str | None:
    # Everything else runs on the CPU, so that compute-sanitizer does not spend time on PyTorch's kernels.
    check = implementations.Check(case, device, getattr(torch, dtype), compared_on=torch.device("cpu"))
    operator = implementations.OPERATORS[case.operator]
    error, where = check.worst(implementations.Implementation(backend, operator, backend), backward=True)
    tolerance = TOLERANCES[dtype] * (MIXER_FACTOR if case.operator == "mixer" else 1)
    return None if error <= tolerance else f"{case.name}: error of {where} is {error:.1e}, above {tolerance:.1e}"


if __name__ == "__main__":
    sys.exit(main())
