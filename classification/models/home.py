"""The home folder, ``~``, in paths that a shell has not expanded: in ``--option=~/folder``, and in config files."""

import os
from pathlib import Path
from typing import Any


def with_home(value: Any) -> Any:
    """The same with ``~`` and ``~user`` at the start of texts and paths, in lists and dictionaries too, expanded.

    Texts without them, names of unknown users and values of other types stay as they are.
    """
    if isinstance(value, dict):
        return type(value)({key: with_home(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map(with_home, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111, Path.expanduser fails for unknown users
    return value
