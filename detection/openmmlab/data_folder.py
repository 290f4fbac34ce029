"""A made data set as a folder that appears whole or not at all, and the command line of those who make one."""

import argparse
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from ...classification.models.home import with_home


def write_whole(folder: Path, files: Collection[str], write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new folder, which gets its name ``folder`` when it is complete.

    A folder that has all the files already is left as it is. What an interrupted run left behind lies in a hidden
    folder beside it, which the next run removes.

    Args:
        files: the paths, relative to the folder, that ``write`` makes.
        write: called with the path of the folder to fill, which exists.

    Raises:
        ValueError: if ``folder`` holds something else.
    """
    folder = folder.resolve()
    if folder.is_dir() and all((folder / file).is_file() for file in files):
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not this data set; remove it or choose another folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def run_command(description: str | None, write: Callable[[Path], str]) -> int:
    """Parse ``FOLDER``, call ``write`` with it and print what it returns; the exit status, 2 for a user's error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="where to write the data set; a new folder")
    folder = with_home(parser.parse_args().folder)
    try:
        print(f"{folder}: {write(folder)}")
    except (ValueError, OSError) as error:  # SetupError among the former
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
