"""Runs of two processes, started with torchrun."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from spatial_mamba.classification.checkpoint import BEST, LATEST
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .runs import accuracy_lines, assert_same, options, torchrun


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL a process and all its descendants: the launcher's processes would outlive it."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, table.splitlines())}
    doomed = [process.pid]
    for victim in doomed:
        doomed += [pid for pid, parent in parents.items() if parent == victim]
    assert len(doomed) >= 3, "the launcher and two processes"
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)


def test_evaluation_agrees_whatever_processes_and_batch_size(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    best = max(json.loads(line)["val_acc1"] for line in (trained / "metrics.jsonl").read_text().splitlines())
    arguments = options(micro, photos, tmp_path / "none", "--eval", "--pretrained", str(trained / BEST))
    results = []
    for batch in ("4", "7"):
        assert main([*arguments, "--batch-size", batch]) == 0
        results.append(accuracy_lines(capfd.readouterr().out))
    with torchrun(2, *arguments) as process:
        results.append(accuracy_lines(process.communicate()[0]))
        assert process.returncode == 0
    assert len(results[0]) == 2, "the model and its EMA"
    assert results[0] == results[1] == results[2]
    assert f"acc@1 {best:.3f}%" in results[0][0] and "/15)" in results[0][0]
    assert not (tmp_path / "none").exists()


def test_killed_training_resumes_to_the_same_weights(micro: Path, photos: Path, tmp_path: Path) -> None:
    """Two processes with loader workers, killed with SIGKILL in the middle of an epoch."""
    more = ("--epochs", "3", "--workers", "1", "--batch-size", "2")
    with torchrun(2, *options(micro, photos, tmp_path / "undisturbed", *more)) as process:
        output = process.communicate()[0]
        assert process.returncode == 0, output

    arguments = options(micro, photos, tmp_path / "killed", *more)
    with torchrun(2, *arguments) as process:
        for line in process.stdout:
            if "epoch 2/3 update 3/6" in line:
                kill_all(process)
                break
        else:
            pytest.fail("the run was never in the middle of its second epoch")
    assert read_checkpoint(tmp_path / "killed" / "micro" / "default" / LATEST)["epoch"] == 0
    with torchrun(2, *arguments) as process:
        output = process.communicate()[0]
        assert process.returncode == 0 and "resumed from" in output, output

    runs = [tmp_path / name / "micro" / "default" for name in ("undisturbed", "killed")]
    a, b = (read_checkpoint(run / LATEST) for run in runs)
    assert a.pop("config")["OUTPUT"] != b.pop("config")["OUTPUT"]
    assert_same(a, b)
    figures = [
        [(r["epoch"], r["train_loss"], r["val_acc1"], r["ema_acc1"]) for r in map(json.loads, lines)]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in runs)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 3
