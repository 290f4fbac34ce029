"""Start the commands of detection and segmentation: check the packages first, and report errors in one line."""

import argparse
import importlib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from spatial_mamba_mmcv import MissingOperatorError

from ...kernels import command_line
from ...kernels.command_line import closest
from ...kernels.errors import UserError
from .packages import check_packages

# Words of errors that users can correct -> what to add to the message.
_REMEDIES = {
    "failed to load image": "",  # a damaged one, says mmcv
    "TTA of instance segmentation": " Use a config without masks.",
    "Expected more than 1 value per channel": (  # for example in UPerNet's pooling
        ": BatchNorm cannot train on a batch of one image; set train_dataloader.batch_size to at least 2 images per "
        "process, and drop_last=True"
    ),
    "loaded state dict": (  # by torch.optim
        ": --resume needs the same frozen stages and optimizer settings; to change them, give load_from=FILE instead"
    ),
}


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
        except (KeyError, TypeError) as error:
            if _is_from_registry(error):
                raise UserError(in_words(error)) from error
            raise
        except (AssertionError, ValueError) as error:
            for words, remedy in _REMEDIES.items():
                if words in str(error) and not isinstance(error, UserError):
                    raise UserError(f"{error}{remedy}") from error
            raise

    try:
        return command_line.run_command(command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_words(error: Exception) -> str:
    """Type and message of an error, or its line in the source if it has none; suggests a type for an unknown one."""
    unknown = re.search(r"(\w\S*) is not in the .*? registry", str(error))
    if unknown and _is_from_registry(error):
        return f"{unknown[0]}{other_type(unknown[1], _origin(error).f_locals['registry'])}"
    return f"{type(error).__name__}: {str(error) or traceback.extract_tb(error.__traceback__)[-1].line}"


def other_type(name: str, registry: Any) -> str:
    """What to do about a type that a registry does not have, to end a message with."""
    known = [*registry.module_dict, *registry.root.module_dict]
    return closest(name, known, cutoff=0.8) or "; types of your own need custom_imports"


def _is_from_registry(error: Exception) -> bool:
    """Whether a registry raised the error: for an unknown type, or for arguments that a constructor does not have.

    Errors in constructors, which may be bugs, come from elsewhere.
    """
    return Path(_origin(error).f_code.co_filename).parent.parts[-2:] == ("mmengine", "registry")


def _origin(error: Exception) -> FrameType:
    """The frame that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame
