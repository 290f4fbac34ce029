"""Reads the record of a training run, ``metrics.jsonl``, and finds short labels for several runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import UserError
from ..run_log import METRICS


@dataclass(frozen=True)
class RunRecord:
    """The epochs of one run.

    Attributes:
        label: the name of the run in a legend.
        epochs: numbers of the finished epochs, from 1.
        values: for each field of the file one number per epoch, NaN if an epoch has none.
    """

    label: str
    epochs: np.ndarray
    values: dict[str, np.ndarray]

    def has(self, field: str) -> bool:
        """Whether any epoch has a number for the field."""
        return field in self.values and bool(np.isfinite(self.values[field]).any())


def read_run(path: Path, label: str) -> RunRecord:
    """Read the record of a run.

    Args:
        path: the folder of the run, or the file itself.
        label: see ``RunRecord``.

    Raises:
        UserError: naming the file, and the line in it that cannot be used.
    """
    file = path / METRICS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; name the folder of a training run, or its {METRICS}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    records = [_record(line, f"{file}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise UserError(f"{file}: holds no finished epoch")
    fields = {name for record in records for name in record}
    values = {name: np.array([record.get(name, np.nan) for record in records]) for name in sorted(fields)}
    return RunRecord(label, values.pop("epoch") + 1, values)


def short_labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish them all, without a file name that all have in common."""
    absolute = [path.absolute() for path in paths]
    parts = [(*path.parent.parts, path.stem if path.is_file() else path.name) for path in absolute]
    if len({names[-1] for names in parts}) == 1 and len(set(parts)) > 1:
        parts = [names[:-1] for names in parts]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(names[-count:]) for names in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def _record(line: str, place: str) -> dict[str, float]:
    """The numbers of one epoch by field; null becomes NaN."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not JSON ({error}); remove the line if a crash cut it short") from error
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        raise UserError(f"{place}: is not the record of an epoch, an object with the number of the epoch")
    numbers = {name: np.nan if value is None else value for name, value in record.items()}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"{place}: {name} must be a number or null, got {value!r}")
    return numbers
