"""Exports models to `torch.export` programs and AOTInductor packages."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

import torch
import torch._inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram

from ...kernels.errors import UserError
from ..models.preprocessing import SMALLEST_SIZE
from ..models.spatial_mamba import SpatialMambaEncoder
from .form import export_form

Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Height and width; a single number stands for both.

    Raises:
        UserError: for fewer than ``SMALLEST_SIZE`` pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < SMALLEST_SIZE:
        raise UserError(
            f"an image size of {height}x{width} is too small; height and width must be at least {SMALLEST_SIZE} pixels"
        )
    return height, width


def export_program(model: SpatialMambaEncoder, size: Size = 224) -> ExportedProgram:
    """Export a program of ATen operations, for any batch size and one image size; ``torch.export.save`` writes it.

    Args:
        model: a classifier or backbone in evaluation mode, not fused; it is not changed. The program is in float32 and
            on the model's device.
        size: height and width of the images, or one number for both.

    Returns:
        The program, which maps images (batch, in_chans, height, width) to the outputs of the model.

    Raises:
        UserError: if the size is too small.
        RuntimeError: for a fused model, or one in training mode.
    """
    height, width = height_and_width(size)
    form = export_form(model)
    device = next(form.parameters()).device
    # A batch of 1 would become a constant.
    images = torch.zeros(2, form.in_chans, height, width, device=device)
    with torch.no_grad(), quiet():
        # PyTorch 2.6 needs an upper bound for the batch, and strict=False, which later became the default.
        return torch.export.export(form, (images,), dynamic_shapes=({0: Dim("batch", max=2**31)},), strict=False)


def export_aoti(
    model: SpatialMambaEncoder,
    path: str | PathLike[str],
    size: Size = 224,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Compile the model for its device and write an AOTInductor package: native code and weights, for Python and C++.

    Code for a CPU uses the instructions of this machine's processor, and needs a processor that has them all.

    Args:
        model: see ``export_program``.
        path: the file to write, which ends in ``.pt2``.
        size: height and width of the images, or one number for both.
        metadata: stored in the package.

    Raises:
        UserError: if the size is too small, or there is no C++ compiler.
        RuntimeError: for a fused model, or one in training mode.
    """
    require_compiler()
    program = export_program(model, size)
    with quiet():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(metadata or {})}
        )


def require_compiler() -> None:
    """Raise UserError unless there is a C++ compiler for AOTInductor."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("AOTInductor needs a C++ compiler: install g++, or set CXX to a compiler") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress PyTorch's warnings to its own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
