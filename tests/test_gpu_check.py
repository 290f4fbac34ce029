"""The GPU checks (``make gpu``): they go on after failures, count skips as failures, and call commands as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba.classification.benchmark import __main__ as models
from spatial_mamba.kernels.__main__ import _parser as kernels_parser
from spatial_mamba.kernels.benchmark import __main__ as operators

from . import gpu_check


@pytest.mark.slow
def test_gpu_check_goes_on_after_failures(tmp_path: Path) -> None:
    python, Step = sys.executable, gpu_check.Step
    show = (
        "import importlib.util, os, sys; where = importlib.util.find_spec('spatial_mamba').origin;"
        "print(*sys.argv[1:], os.environ['COLOUR'], os.path.samefile(os.path.dirname(where), os.getcwd()))"
    )
    outcomes = gpu_check.run(
        [
            Step("fails", (python, "-c", "print('about to fail'); raise SystemExit(3)"), 20),
            Step("hangs", (python, "-c", "import time; print('so far', flush=True); time.sleep(60)"), 4),
            Step("works", (python, "-c", show, "{seconds}", "{out}/part"), 20, {"COLOUR": "blue"}),
        ],
        tmp_path,
        total_seconds=20.0,
    )
    assert [outcome["passed"] for outcome in outcomes] == [False, False, True]
    assert [outcome["result"] for outcome in outcomes] == ["exit 3", "out of time", "exit 0"]
    assert [outcome["last_line"] for outcome in outcomes[:2]] == ["about to fail", "so far"]
    assert sum(outcome["seconds"] for outcome in outcomes) < 20
    log = (tmp_path / "log.txt").read_text()
    assert "about to fail" in log and f"{tmp_path}/part blue True" in log
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["passed"] and summary["steps"] == outcomes
    fails = next(line for line in (tmp_path / "summary.md").read_text().splitlines() if "| fails |" in line)
    assert fails.startswith("| fails | **failed**: exit 3 |") and fails.endswith("| about to fail |")


def test_gpu_check_runs_some_steps_at_the_same_time(tmp_path: Path) -> None:
    """Each of two steps waits for the file of the other."""
    code = (
        "import pathlib, sys, time; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\nprint('met')"
    )
    names = ("{out}/a", "{out}/b")
    steps = [
        gpu_check.Step(name, (sys.executable, "-c", code, *files), 1, together="pair")
        for name, files in (("first", names), ("second", names[::-1]))
    ]
    assert all(outcome["passed"] for outcome in gpu_check.run(steps, tmp_path, total_seconds=20.0))
    assert {"first: met", "second: met"} <= set((tmp_path / "log.txt").read_text().splitlines())


def test_gpu_check_selects_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []

    def run(steps: list[gpu_check.Step], out: Path, seconds: float) -> list:
        ran.append(([step.name for step in steps], seconds))
        (out / "summary.md").write_text("")
        return []

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "_gpu_problem", lambda: "")
    options = ["--steps", "tests", "self-test", "--seconds", "250"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), *options])
    assert gpu_check.main() == 0
    assert ran == [(["self-test, report", "self-test", "tests"], 250.0)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(False)", "error: PyTorch finds no usable GPU; "),
        ("raise ImportError('no torch')", "cannot import PyTorch (ImportError: no torch); choose another interpreter"),
    ],
)
def test_gpu_check_needs_a_gpu(
    code: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_check, "PYTHON", str(python))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out")])
    assert gpu_check.main() == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_check_calls_commands_as_they_are() -> None:
    parsers = {
        "spatial_mamba.kernels": kernels_parser,
        "spatial_mamba.kernels.benchmark": operators._parser,
        "spatial_mamba.classification.benchmark": models._parser,
    }
    called = []
    for step in gpu_check.STEPS:
        command = [part.format(out="folder", seconds=9) for part in step.command]
        _, _, module, *options = command[command.index(sys.executable) :]
        if module in parsers:
            parsers[module]().parse_args(options)
            called.append(step.choice)
    assert list(dict.fromkeys(called)) == ["build", "self-test", "sanitizer", "models", "operators"]


@pytest.mark.slow
def test_gpu_tests_fail_if_they_are_skipped() -> None:
    command = [*gpu_check.PYTEST, "-n", "0", "tests/classification/test_benchmark.py"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT, env=environment)
    assert done.returncode == 1 and done.stdout.count("needs a GPU that PyTorch can use; a GPU check must run") >= 4
    assert done.stdout.index("a GPU check must run") < done.stdout.index("= ERRORS =")  # as it happens, and at the end


@pytest.mark.slow
def test_gpu_tests_are_found_without_the_trainers_packages() -> None:
    """On a machine with PyTorch, timm and little else, test files that need more packages are left out."""
    code = (
        "import sys, pytest; sys.modules.update(dict.fromkeys(('yacs', 'fvcore', 'mmengine')));"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *gpu_check.gpu_tests()]
    found = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT)
    assert found.returncode == 0, found.stdout
    assert "test_gpu_runs_the_forms" in found.stdout
