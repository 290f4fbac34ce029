"""Write generated data sets: the folder appears complete or not at all. Includes the command that writes them."""

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..kernels.command_line import Parser, run_command
from ..kernels.errors import UserError


def write_folder(folder: Path, files: Collection[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, and rename it to ``folder`` when it is complete.

    A folder that has all the files already is left as it is. An interrupted run leaves a hidden folder next to it,
    which the next run removes.

    Args:
        files: the paths that ``write`` makes, relative to the folder.
        write: called with the path of the empty folder to fill.

    Raises:
        UserError: if ``folder`` holds something else.
    """
    folder = folder.resolve()
    if folder.is_dir() and all((folder / file).is_file() for file in files):
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not this data set; remove it or choose another folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def run_demo_data(package: str, write: Callable[[Path], str], argv: Sequence[str] | None = None) -> int:
    """Run ``python -m spatial_mamba.PACKAGE.demo_data FOLDER``.

    Args:
        package: ``classification``, ``detection`` or ``segmentation``.
        write: called with the folder; returns what the folder holds, in words.

    Returns:
        The exit status: 0, or 2 after one line that names what is wrong.
    """

    def command() -> None:
        purpose = (write.__doc__ or "").partition("\n\n")[0]
        parser = Parser(f"python -m spatial_mamba.{package}.demo_data", purpose)
        parser.add_argument("folder", type=Path, help="where to write the data set; a new folder")
        folder = parser.parse_args(argv).folder
        try:
            print(f"{folder}: {write(folder)}")
        except OSError as error:
            raise UserError(str(error)) from error

    return run_command(command)
