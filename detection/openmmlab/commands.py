"""Start the commands of detection and segmentation: check the packages first, and report errors in one line."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from spatial_mamba_mmcv import MissingOperatorError

from ...kernels import command_line
from ...kernels.errors import UserError
from .packages import check_packages


class Parser(command_line.Parser):
    """The parser of all commands, for options with mmengine's ``DictAction`` too."""

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        try:
            return super().parse_args(args)
        except UserError:
            raise
        except ValueError as error:  # a value that mmengine cannot split
            raise UserError(f"--cfg-options takes KEY=VALUE pairs ({error})") from error


def run_command(package: str, module: str, function: str, *args: Any) -> int:
    """Call ``function(*args)`` of a module of ``spatial_mamba`` that needs ``mmdet`` or ``mmseg``.

    The module is imported only after the packages have been checked.

    Returns:
        The exit status: 0, or 2 after one line that names what is wrong.
    """

    def command() -> None:
        try:
            check_packages(package)
            getattr(importlib.import_module(f"spatial_mamba.{module}"), function)(*args)
        except (MissingOperatorError, OSError) as error:
            raise UserError(str(error)) from error
        except AssertionError as error:
            if "failed to load image" in str(error):  # how mmcv reports a damaged image
                raise UserError(str(error)) from error
            raise

    try:
        return command_line.run_command(command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
