"""Expand ``~`` in paths that no shell has expanded: in ``--option=~/folder``, config files and Python."""

import os
from pathlib import Path
from typing import Any


def with_home(value: Any) -> Any:
    """Expand ``~`` and ``~user`` at the start of strings and paths, also within lists, tuples and dictionaries.

    Other values, and names of unknown users, stay as they are.
    """
    if isinstance(value, dict):
        return type(value)({key: with_home(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map(with_home, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111, Path.expanduser fails for unknown users
    return value
