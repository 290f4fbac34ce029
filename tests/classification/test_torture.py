"""A short form of ``make torture``."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_and_failing_runs_resume_to_the_same_bits() -> None:
    command = [sys.executable, "-m", "spatial_mamba.tests.torture", "--kills", "2", "--damages", "40", "--every", "100"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kills, kills_of_two, writes, damages = result.stdout.splitlines()
    assert "kills of" in kills and "of 2 process(es)" in kills_of_two
    assert "writes failed in turn" in writes and "40 damaged checkpoints" in damages
