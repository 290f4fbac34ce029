"""A short run of the fuzzer, and a check that it finds what a loader must not do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spatial_mamba.kernels.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer needs Linux")


@pytest.mark.slow
def test_loaders_accept_or_refuse_every_input() -> None:
    """In a new process: autograd, which one target needs, may have threads here, and then fails after a fork."""
    script = """if True:
        from spatial_mamba.tests import fuzz
        # Targets of little weight build a model for each input.
        counts = {name: 150 if target.weight > 1 else 30 for name, target in fuzz.TARGETS.items()}
        assert not [name for name, count in counts.items() if fuzz.fuzz(name, count, seed=1)]
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" inputs: ") >= 12


def refuse_after(error: Exception) -> None:
    raise UserError("refused") from error


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda folder: {}["key"], "KeyError: 'key'"),
        (lambda folder: os.abort(), "SIGABRT"),
        (lambda folder: time.sleep(10), "SIGALRM"),
        (lambda folder: refuse_after(MemoryError("1 GB")), "MemoryError: 1 GB"),
        (lambda folder: bytes(2**40), "MemoryError"),
        (lambda folder: setattr(torch, "harm", 1), "['harm']"),
        (lambda folder: os.environ.update(HARM="1"), "'HARM': '1'"),
        (lambda folder: (folder.parent / "harm").write_text(""), "/harm"),
        (lambda folder: subprocess.run(["true"]), "subprocess.Popen"),
    ],
    ids=["error", "crash", "time", "hidden", "memory", "attribute", "environment", "file", "program"],
)
def test_harm_is_found(
    act: Callable[[Path], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from .. import fuzz

    def run(folder: Path) -> None:
        if folder.name == "input":  # the seeds are in other folders
            act(folder)

    target = fuzz.Target(fuzz.inputs.records, lambda files, rng: files, run, weight=1)
    monkeypatch.setattr(fuzz, "FAILURES", tmp_path)
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setitem(fuzz.TARGETS, "bad", target)
    assert fuzz.fuzz("bad", 1, seed=0) == 1
    assert words in (tmp_path / "bad-0-0" / "traceback.txt").read_text()
    assert (tmp_path / "bad-0-0" / "metrics.jsonl").is_file()
    assert "1 inputs:       0 accepted,       0 refused" in capsys.readouterr().out
