"""Everything that needs a GPU, in one go: build, report, tests, benchmarks, compute-sanitizer (``make gpu``).

Started by its path with any Python that has PyTorch; nothing is installed or downloaded. To add a check, add a `Step`.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 470  # just under the 8 minutes that all may take
PLANNED_SHARE = 0.75  # of its time, for a step that watches the clock itself
LAST_LINES = 12  # of a step's output that the terminal shows; the log has all


@dataclass(frozen=True)
class Step:
    """A command, and the seconds after which it is ended.

    In the command ``{out}`` stands for the folder of the results and ``{seconds}`` for the time that it may plan with,
    wherever they occur. An optional step is no failure when no time is left to start it.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended, in words, and the last line that it printed."""

    name: str
    command: str
    status: str
    seconds: float
    passed: bool
    last_line: str = ""


def steps() -> list[Step]:
    """All checks, in order. The first ones come cheap and tell what the others will meet."""
    python = sys.executable
    exercise = (python, "-m", "spatial_mamba.kernels.benchmark.exercise")
    on_cuda = (*exercise, "cuda")
    on_triton = (*exercise, "triton", "--dtype", "float32", "bfloat16")  # each dtype is compiled anew
    benchmark = (python, "-m", "spatial_mamba.kernels.benchmark", "--device", "cuda", "--dtype", "float32", "bfloat16")
    models = (python, "-m", "spatial_mamba.classification.benchmark", "--device", "cuda", "--dtype", "bfloat16")
    budget = (python, "-m", "spatial_mamba.classification.benchmark.budget", "--device", "cuda", "--dtype", "bfloat16")
    tiny = ("--batch", "128", "--models", "spatial_mamba_tiny", "swin_tiny*")
    published, convnext = "published/spatial_mamba_tiny", "convnext_tiny"
    timed = ("--seconds", "5", "--limit", "{seconds}", "--out")
    parts = ("--mode", "fused", "forward+backward", "--batch", "128", "--seconds", "0.5", "--out", "{out}/models")
    briefly = ("--seconds", "0.3", "--compile", "core/tiny/stage1/224x224", "--limit", "{seconds}", "--out", "{out}")
    # A memory block for each tensor, else overruns stay inside PyTorch's pool, unseen.
    unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("GPU", (python, "-c", "import torch; print(torch.ones(1).cuda().device, torch.version.cuda)"), 40),
        Step("build", (python, "-m", "spatial_mamba.kernels", "build", "cpu", "cuda"), 180),
        Step("report", (python, "-m", "spatial_mamba.kernels"), 40),
        Step("tests", (python, "-m", "pytest", "-m", "gpu", *_files_with_gpu_tests()), 150),
        Step(
            "models, inference",
            (*models, *tiny, convnext, published, "--form", "eager", "fused", *timed, "{out}/models/inference"),
            60,
        ),
        Step(
            "models, compiled",
            (*models, *tiny, convnext, "--form", "fused+compile", *timed, "{out}/models/compiled"),
            110,
        ),
        Step("models, training", (*models, *tiny, published, "--mode", "train", *timed, "{out}/models/training"), 50),
        Step("models, parts", (*budget, *parts), 40),
        Step("memcheck, cuda", _sanitize("memcheck", on_cuda), 60, unpooled),
        Step("memcheck, triton", _sanitize("memcheck", on_triton), 90, unpooled),
        Step("benchmark", (*benchmark, *briefly), 100),
        Step("racecheck, cuda", _sanitize("racecheck", on_cuda), 60, optional=True),
        Step("racecheck, triton", _sanitize("racecheck", on_triton), 60, optional=True),
        Step("synccheck, cuda", _sanitize("synccheck", on_cuda), 40, optional=True),
        Step("initcheck, cuda", _sanitize("initcheck", on_cuda), 40, unpooled, optional=True),
    ]


def run(todo: Sequence[Step], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[Outcome]:
    """Run all steps, also after one has failed, with the package importable from this checkout.

    Writes ``log.txt``, ``summary.json`` and ``summary.md`` into ``out``, the summaries anew after each step.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_seconds
    outcomes: list[Outcome] = []
    with (out / "log.txt").open("w+", encoding="utf-8", errors="replace") as log, _importable() as environment:
        for step in todo:
            outcomes.append(_run_step(step, out, log, environment, min(step.seconds, end - time.monotonic())))
            _summarise(outcomes, out)
    return outcomes


def _run_step(step: Step, out: Path, log: IO[str], environment: Mapping[str, str], seconds: float) -> Outcome:
    places = {"{out}": str(out.resolve()), "{seconds}": str(max(1, round(PLANNED_SHARE * seconds)))}
    command = list(step.command)
    for place, value in places.items():
        command = [part.replace(place, value) for part in command]
    shown = shlex.join([*(f"{name}={value}" for name, value in step.environment.items()), *command])
    if seconds <= 0:
        return Outcome(step.name, shown, "no time left", 0.0, passed=step.optional)

    print(f"== {step.name}: {shown}", flush=True)
    print(f"== {step.name}: {shown}", file=log, flush=True)
    begin, start = log.tell(), time.monotonic()
    status = _wait(command, {**environment, **step.environment}, log, seconds)
    elapsed = time.monotonic() - start
    log.seek(begin)
    lines = log.read().splitlines()
    print("\n".join(lines[-LAST_LINES:]))
    log.seek(0, os.SEEK_END)
    for place in (log, None):
        print(f"== {step.name}: {status} after {elapsed:.1f} s\n", file=place, flush=True)
    last_line = next((line for line in reversed(lines) if line.strip()), "")
    return Outcome(step.name, shown, status, elapsed, status == "exit 0", last_line)


def _wait(command: Sequence[str], environment: Mapping[str, str], log: IO[str], seconds: float) -> str:
    """Run a command into the log; how it ended. All processes that it started end with it."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return f"not started: {error.strerror}: {command[0]}"
    try:
        return f"exit {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        return f"ended after its {seconds:.1f} s"
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # where there are no groups of processes
            process.wait()


@contextmanager
def _importable() -> Iterator[dict[str, str]]:
    """An environment in which this checkout, whatever its folder is called, is the package ``spatial_mamba``.

    The tools of a CUDA toolkit are on its path too, last.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "spatial_mamba").symlink_to(ROOT)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        tools = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
        programs = os.pathsep.join(filter(None, (os.environ.get("PATH"), tools)))
        yield {**os.environ, "PYTHONPATH": path, "PATH": programs, "PYTHONUNBUFFERED": "1"}


def _sanitize(tool: str, command: Sequence[str]) -> tuple[str, ...]:
    options = ("--target-processes", "application-only", "--error-exitcode", "1", "--print-limit", "20")
    return ("compute-sanitizer", "--tool", tool, *options, *command)


def _files_with_gpu_tests() -> list[str]:
    """The other files may import what this machine lacks. Should there be none, pytest fails for want of tests."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def _summarise(outcomes: Sequence[Outcome], out: Path) -> None:
    passed = all(outcome.passed for outcome in outcomes)
    facts = {"machine": platform.platform(), "python": platform.python_version(), "gpu": _gpu()}
    record = {"passed": passed, **facts, "steps": [asdict(outcome) for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| step | result | seconds | last line of its output |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {outcome.name} | {'' if outcome.passed else '**failed**: '}{outcome.status} | {outcome.seconds:.1f} "
        f"| {outcome.last_line.replace('|', ' ')} |"
        for outcome in outcomes
    ]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none found by nvidia-smi"


def main() -> int:
    """Run all steps; 0 if all passed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "output/gpu", help="folder for the results")
    out = parser.parse_args().out.expanduser()
    outcomes = run(steps(), out)
    print((out / "summary.md").read_text())
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
