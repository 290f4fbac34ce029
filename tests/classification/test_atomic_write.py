"""Atomic writes and locks of files."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_mamba.classification.atomic_write import lock, save


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """PyTorch's writer alone reports an assertion of its own."""
    path = tmp_path / "weights.pth"
    save({"a": torch.ones(3)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save({"a": torch.ones(2**20), "b": torch.ones(2**20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


LOCK_AND_FORK = """
import os, sys, time
from spatial_mamba.classification.atomic_write import lock
file = open(sys.argv[1], "w")
lock(file)
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process_though_children_live_on(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", LOCK_AND_FORK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, path.open("w") as file:
        assert process.stdout
        child = int(process.stdout.readline())
        with pytest.raises(BlockingIOError):
            lock(file)
        process.kill()
        process.wait()
        lock(file)
        os.kill(child, signal.SIGKILL)
