"""Choose the backend for a device and dtype: a compiled library, Triton, or the reference implementation."""

import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import failures, native

# Fastest first; "torch", the reference implementation, serves everything.
PREFERENCE = {"cpu": ("cpu", "triton", "torch"), "cuda": ("cuda", "triton", "torch")}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_TRITON = (3, 4)  # comes with PyTorch 2.8; older versions lack features that the kernels use
BACKENDS = ("cpu", "cuda", "triton", "torch")
FORCE_VARIABLE = "SPATIAL_MAMBA_BACKEND"
REQUIRE_VARIABLE = "SPATIAL_MAMBA_REQUIRE_NATIVE"


def _why_no_triton() -> str | None:
    version = native.triton_version()
    if version is None:
        return "Triton is not installed: pip install triton"
    release = re.match(r"(\d+)\.(\d+)", version)
    if release and tuple(map(int, release.groups())) < OLDEST_TRITON:
        return "Triton {} is too old, {}.{} is needed: upgrade PyTorch".format(version, *OLDEST_TRITON)
    # Triton compiles the launchers of its kernels as C programs.
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not _interpreted and not (any(map(shutil.which, compilers)) and headers.exists()):
        return "Triton needs a C compiler and Python's headers: apt install gcc python3-dev"
    return None


def _read_force_variable() -> str | None:
    name = os.environ.get(FORCE_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ImportError(f"{FORCE_VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Why each backend is unavailable, or None if it is available. Computed once, at import: constants for torch.compile.
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_missing = {"cpu": native.load("cpu"), "cuda": native.load("cuda"), "triton": _why_no_triton(), "torch": None}
_failed = failures.recorded()
# A backend serves an operator if its folder contains a file of that name.
_FOLDERS = {"cpu": "csrc/cpu", "cuda": "csrc/cuda", "triton": "triton"}
_operators = {
    name: {file.stem for file in (Path(__file__).parent / where).glob("*")} for name, where in _FOLDERS.items()
}
_required = os.environ.get(REQUIRE_VARIABLE) == "1"
_forced = _read_force_variable()
_always_custom = False
_hinted: set[str] = set()
# Results of `serving`, which every operator needs several times per call. Clear it whenever they may change.
_served: dict[tuple[str, torch.dtype, torch.device], str] = {}


def why_not(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
    even_if_it_failed: bool = False,
) -> str | None:
    """Why a backend cannot serve tensors of this device type and dtype, or None if it can.

    Args:
        backend: its name.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: of the tensors.
        capability: the compute capability of the GPU, if known.
        even_if_it_failed: ignore failures of the self-test.
    """
    if backend == "torch":
        return None
    if backend not in PREFERENCE.get(device_type, ()):
        return f"the {backend} backend has no kernels for {device_type} tensors"
    if dtype not in DTYPES[backend]:
        return f"the {backend} backend has no kernels for {dtype}"
    if backend == "triton" and device_type == "cpu" and not _interpreted:
        return "Triton runs on the CPU only in its interpreter, which is for tests: set TRITON_INTERPRET=1"
    if backend == "cuda" and _missing["cuda"] is None and capability and not native.kernels_for(capability):
        return "built without code for compute capability {0}.{1}: {2} cuda --arch {0}.{1}".format(
            *capability, native.BUILD_COMMAND
        )
    if _failed and _missing[backend] is None and not even_if_it_failed:
        name = failures.name_of(backend, dtype, device_type, capability)
        if any(failure.startswith(name) for failure in _failed):
            return f"failed the self-test with {dtype}: spatial-mamba kernels check --device {device_type} tests again"
    return _missing[backend]


def ignore_failures() -> None:
    """Allow backends again that have failed the self-test, in this process."""
    global _failed
    _failed = ()
    _served.clear()


def serving(
    device_type: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
    operator: str = "structure_aware_scan",
) -> str:
    """Name of the backend that serves an operator on tensors of this device type and dtype.

    That is the fastest usable one among those that implement the operator, or the forced one, with the reference
    implementation for operators that it lacks.

    Raises:
        RuntimeError: if the forced backend cannot be used, or native code is required but missing.
    """
    if _forced is not None:
        reason = why_not(_forced, device_type, dtype, capability, even_if_it_failed=True)
        if reason is not None:
            raise RuntimeError(f"the backend {_forced!r} is forced, but cannot be used: {reason}")
        return _forced if implements(_forced, operator) else "torch"
    # Interpreted Triton kernels are only for tests, which force them.
    candidates = [name for name in PREFERENCE.get(device_type, ("torch",)) if (name, device_type) != ("triton", "cpu")]
    fastest, *others = (name for name in candidates if implements(name, operator))
    reason = why_not(fastest, device_type, dtype, capability)
    if reason is None:
        return fastest
    best = next(name for name in others if why_not(name, device_type, dtype, capability) is None)
    if dtype in DTYPES[fastest]:  # otherwise the user could not make it faster
        if _required:
            raise RuntimeError(f"{REQUIRE_VARIABLE}=1, but the {fastest} backend cannot be used: {reason}")
        if not torch.compiler.is_compiling() and device_type not in _hinted:
            _hinted.add(device_type)
            message = f"{device_type} operators run on the {best!r} backend; {fastest!r} would be faster: {reason}"
            warnings.warn(message, stacklevel=2)
    return best


def implements(backend: str, operator: str) -> bool:
    """Whether a backend has kernels for an operator; the reference implementation has all."""
    return backend == "torch" or operator in _operators[backend]


def _serving(tensor: Tensor, operator: str) -> str:
    """`serving` for the device and dtype of a tensor, cached."""
    dtype, device = tensor.dtype, tensor.device
    if torch.compiler.is_compiling():
        return serving(device.type, dtype, operator=operator)
    name = _served.get((operator, dtype, device))
    if name is None:
        # Fake tensors can be on a GPU that does not exist.
        known = device.type == "cuda" and torch.cuda.is_initialized()
        name = serving(device.type, dtype, torch.cuda.get_device_capability(device) if known else None, operator)
        if known or device.type != "cuda":
            _served[operator, dtype, device] = name
    return name


def module_for(tensor: Tensor, operator: str) -> ModuleType | None:
    """The module or namespace of the backend that serves an operator on this tensor; None for the reference.

    Raises:
        RuntimeError: see `serving`.
    """
    name = _serving(tensor, operator)
    if name == "torch":
        return None
    if name == "triton":
        from . import triton

        return triton
    return getattr(torch.ops, f"spatial_mamba_{name}")


@torch.compiler.assume_constant_result
def custom_operators_fail() -> bool:
    """Whether PyTorch is doing something that custom operators do not support.

    These are transforms of torch.func, forward-mode differentiation and ONNX export. Custom operators would raise an
    error there or give a zero tangent.
    """
    return _is_transformed() or (is_traced() and torch.onnx.is_in_onnx_export())  # asked last: it takes 2 us


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether a compiler, tracer or dispatch mode sees the calls of operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._get_tracing_state() is not None


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether PyTorch only computes with these tensors: no compiler, tracer, dispatch mode or transform is at work.

    False for None, subclasses of tensors, sparse tensors, and views that negate their elements when they are read.
    """
    if is_traced() or _is_transformed():
        return False
    for x in tensors:
        if (type(x) is not Tensor and type(x) is not torch.nn.Parameter) or x.layout != torch.strided or x.is_neg():
            return False
    return True


def reference_serves(tensor: Tensor, operator: str = "structure_aware_scan") -> bool:
    """Whether calls of the operator on this tensor run the reference implementation, not a custom operator."""
    if _always_custom:
        return False
    return custom_operators_fail() or _serving(tensor, operator) == "torch"


def has_kernels(operator: str, *tensors: Tensor) -> bool:
    """Whether PyTorch does nothing but compute with these tensors, and a native backend serves the operator on them."""
    return plain_eager(*tensors) and (_always_custom or _serving(tensors[0], operator) != "torch")


@contextmanager
def custom_operators_only() -> Iterator[None]:
    """Use custom operators within the ``with`` block, even for the reference implementation, to count their FLOPs."""
    global _always_custom
    before, _always_custom = _always_custom, True
    try:
        yield
    finally:
        _always_custom = before


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend within the ``with`` block, for tests and bug reports. Affects all threads of the process.

    The environment variable ``SPATIAL_MAMBA_BACKEND`` does the same for a whole process.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"`` (the reference implementation).

    Raises:
        ValueError: if the name is unknown. Operators raise RuntimeError if the backend cannot serve their tensors.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"the backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    _served.clear()
    try:
        yield
    finally:
        _forced = before
        _served.clear()
