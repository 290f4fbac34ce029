"""Run all checks that need a GPU: build, report, tests, benchmarks and compute-sanitizer (``make gpu``).

Run it by its path, with any Python that has PyTorch; nothing is installed or downloaded. To add a check, add a `Step`.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 470  # just under 8 minutes for all steps
PLANNED_FRACTION = 0.75  # of a step's time, given to commands that have their own time limit


@dataclass(frozen=True)
class Step:
    """A command, and the seconds after which it is stopped.

    In the command, ``{out}`` is replaced by the results folder, and ``{seconds}`` by the longest time it should take.
    An optional step does not fail if no time is left to start it.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False


def files_with_gpu_tests() -> list[str]:
    """The test files to run; others may import packages that are not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def sanitize(tool: str, command: Sequence[str]) -> tuple[str, ...]:
    """The command, run under a tool of compute-sanitizer."""
    options = ("--target-processes", "application-only", "--error-exitcode", "1", "--print-limit", "20")
    return ("compute-sanitizer", "--tool", tool, *options, *command)


PYTHON = sys.executable
OPERATORS = (
    PYTHON, "-m", "spatial_mamba.kernels.benchmark", "--device", "cuda", "--dtype", "float32", "bfloat16",
    "--seconds", "0.3", "--limit", "{seconds}", "--out",
)  # fmt: skip
ON_CUDA = (PYTHON, "-m", "spatial_mamba.kernels.benchmark.exercise", "cuda")
ON_TRITON = (*ON_CUDA[:-1], "triton", "--dtype", "float32", "bfloat16")  # each dtype is compiled separately
MODELS = (
    PYTHON, "-m", "spatial_mamba.classification.benchmark", "--device", "cuda", "--dtype", "bfloat16", "--batch", "128",
    "--limit", "{seconds}", "--models", "spatial_mamba_tiny",
)  # fmt: skip
PEERS, BASELINE, TIMED = ("swin_tiny*", "convnext_tiny"), "baseline/spatial_mamba_tiny", ("--seconds", "5", "--out")
# Give each tensor its own memory block; overruns inside PyTorch's pool would not be seen.
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

# The first steps are quick and find what would make the others fail.
STEPS = [
    Step("GPU", (PYTHON, "-c", "import torch; print(torch.ones(1).cuda().device, torch.version.cuda)"), 40),
    Step("build", (PYTHON, "-m", "spatial_mamba.kernels", "build", "cpu", "cuda"), 180),
    Step("report", (PYTHON, "-m", "spatial_mamba.kernels"), 40),
    Step("tests", (PYTHON, "-m", "pytest", "-m", "gpu", *files_with_gpu_tests()), 150),
    Step(
        "models, inference",
        (*MODELS, *PEERS, BASELINE, "--form", "eager", "fused", *TIMED, "{out}/models/inference"),
        60,
    ),
    Step("models, compiled", (*MODELS, *PEERS, "--form", "fused+compile", *TIMED, "{out}/models/compiled"), 110),
    Step("models, training", (*MODELS, PEERS[0], BASELINE, "--mode", "train", *TIMED, "{out}/models/training"), 50),
    Step(
        "models, parts",
        (*MODELS, "--parts", "--mode", "inference", "train", "--form", "fused", *TIMED, "{out}/models"),
        40,
    ),
    Step("memcheck, cuda", sanitize("memcheck", ON_CUDA), 60, UNPOOLED),
    Step("memcheck, triton", sanitize("memcheck", ON_TRITON), 90, UNPOOLED),
    Step(
        "operators, compiled",
        (*OPERATORS, "{out}/compiled", "--cases", "core/tiny/stage1/224x224", "--implementations", "*"),
        50,
    ),
    Step("operators", (*OPERATORS, "{out}"), 80),
    Step("racecheck, cuda", sanitize("racecheck", ON_CUDA), 60, optional=True),
    Step("racecheck, triton", sanitize("racecheck", ON_TRITON), 60, optional=True),
    Step("synccheck, cuda", sanitize("synccheck", ON_CUDA), 40, optional=True),
    Step("initcheck, cuda", sanitize("initcheck", ON_CUDA), 40, UNPOOLED, optional=True),
]  # fmt: skip


def run(steps: Sequence[Step], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[dict[str, Any]]:
    """Run all steps, even after one has failed, with the package importable from this checkout.

    Writes ``log.txt``, ``summary.json`` and ``summary.md`` to ``out`` after each step.

    Returns:
        For each step its name, command, result in words, seconds, whether it passed, and its last line of output.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end, outcomes = time.monotonic() + total_seconds, []
    with tempfile.TemporaryDirectory() as folder:
        # The folder of this checkout may have any name. The CUDA toolkit's tools come last.
        Path(folder, "spatial_mamba").symlink_to(ROOT)
        tools = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
        paths = {"PYTHONPATH": (folder, os.environ.get("PYTHONPATH")), "PATH": (os.environ.get("PATH"), tools)}
        environment = {name: os.pathsep.join(filter(None, parts)) for name, parts in paths.items()}
        for step in steps:
            outcomes.append(
                _run_step(step, out, {**os.environ, **environment}, min(step.seconds, end - time.monotonic()))
            )
            _summarise(outcomes, out)
    return outcomes


def _run_step(step: Step, out: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    places = {"out": out.resolve(), "seconds": max(1, round(PLANNED_FRACTION * seconds))}
    command = [part.format(**places) for part in step.command]
    print(f"== {step.name}: {shlex.join(command)}", flush=True)
    start, result, output = time.monotonic(), "no time left", ""
    if seconds > 0:
        # timeout also stops all processes that the command started.
        done = subprocess.run(
            ["timeout", "--signal=KILL", str(seconds), *command],
            cwd=ROOT,
            env={**environment, "PYTHONUNBUFFERED": "1", **step.environment},  # keeps the output of a stopped command
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, result = done.stdout.decode(errors="replace"), f"exit {done.returncode}"
    taken = time.monotonic() - start
    if 0 < seconds <= taken:
        result = f"stopped after {seconds:.1f} s"
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"== {step.name}: {shlex.join(command)}\n{output}\n== {result}\n\n")
    last_line = output.rstrip().rpartition("\n")[2]
    print(f"{last_line}\n== {result} after {taken:.1f} s\n", flush=True)
    passed = result == "exit 0" or (seconds <= 0 and step.optional)
    return dict(
        name=step.name, command=shlex.join(command), result=result, seconds=taken, passed=passed, last_line=last_line
    )


def _summarise(outcomes: Sequence[dict[str, Any]], out: Path) -> None:
    facts = {"machine": platform.platform(), "python": platform.python_version(), "gpu": _gpu()}
    record = {"passed": all(outcome["passed"] for outcome in outcomes), **facts, "steps": outcomes}
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| step | result | seconds | last line of its output |", "| --- | --- | --- | --- |"]
    for step in outcomes:
        result = f"{'' if step['passed'] else '**failed**: '}{step['result']}"
        lines.append(f"| {step['name']} | {result} | {step['seconds']:.1f} | {step['last_line'].replace('|', ' ')} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none found by nvidia-smi"


def main() -> int:
    """Run all steps.

    Returns:
        The exit status: 0 if all passed, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "output/gpu", help="folder for the results")
    out = parser.parse_args().out.expanduser()
    outcomes = run(STEPS, out)
    print((out / "summary.md").read_text())
    return int(not all(outcome["passed"] for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
