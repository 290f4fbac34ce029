"""How every command of both rooms starts and reports: packages checked first, one line for what a user can mend."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from spatial_mamba_mmcv import MissingOperatorError

from ...classification.models.home import with_home
from ...classification.models.image_files import ImageFileError
from ...classification.models.weights import WeightsError
from .packages import SetupError, check_packages

_USER_ERRORS = (SetupError, WeightsError, ImageFileError, MissingOperatorError, OSError)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as every other wrong input is, and knows the home folder in paths, ``~``."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{message} (--help lists the options)")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse, where values that mmengine cannot split count as wrong options too."""
        try:
            return argparse.Namespace(**with_home(vars(super().parse_args(args))))
        except SetupError:
            raise
        except ValueError as error:
            raise SetupError(f"--cfg-options takes KEY=VALUE pairs ({error})") from error


def run_command(package: str, module: str, function: str, *args: Any) -> int:
    """Call ``function(*args)`` of a module of ``spatial_mamba`` that needs ``mmdet`` or ``mmseg``.

    The module is imported once the packages are known to be there.

    Returns:
        The exit status: 0, or 2 after one line that names what is wrong.
    """
    try:
        check_packages(package)
        getattr(importlib.import_module(f"spatial_mamba.{module}"), function)(*args)
    except _USER_ERRORS as error:
        # Mostly every process finds the same, and the first one speaks; the launcher then ends the others.
        if launched_rank() > 0:
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def launched_rank() -> int:
    """Rank given by the launcher (torchrun or Slurm); 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
