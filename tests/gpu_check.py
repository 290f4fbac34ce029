"""Run all checks that need a GPU: build, self-test, tests, compute-sanitizer and benchmarks (``make gpu``).

Run it by its path, with any Python that has PyTorch; nothing is installed or downloaded. To add a check, add a `Step`.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 780.0  # of all steps, by default: enough for a host that takes 40 us per launch
PLANNED_FRACTION = 0.75  # of a step's time, given to commands that have their own time limit
PYTHON = sys.executable


@dataclass(frozen=True)
class Step:
    """A command, and its part of the total time, after which it is stopped.

    In the command, ``{out}`` is replaced by the results folder, and ``{seconds}`` by the longest time it should take.

    Args:
        name: ``--steps`` selects by its first word, up to a comma.
        command: the words of the command.
        seconds: its part of the time, in proportion to those of the other steps.
        environment: additional variables.
        together: neighbouring steps with the same value here run at the same time.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    together: str = ""

    @property
    def choice(self) -> str:
        """The value of ``--steps`` that selects it."""
        return self.name.partition(",")[0]


def gpu_tests() -> list[str]:
    """The test files that have GPU tests; others may import packages that are not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def sanitize(tool: str, backend: str, dtype: str) -> Step:
    """The self-test of a backend, run under a tool of compute-sanitizer."""
    # Without a launch timeout: by default the tool gives up on a process that takes a while to import PyTorch.
    options = ("--launch-timeout", "0", "--target-processes", "application-only")
    options += ("--error-exitcode", "1", "--print-limit", "20")
    command = ("compute-sanitizer", "--tool", tool, *options, *SELF_TEST, backend, "--dtype", dtype)
    # Memory checks give each tensor its own memory block; overruns inside PyTorch's pool would not be seen.
    unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    return Step(f"sanitizer, {tool}, {backend}, {dtype}", command, 300, ONE_THREAD | unpooled, "tests")


KERNELS = (PYTHON, "-m", "spatial_mamba.kernels")
SELF_TEST = (*KERNELS, "check", "--device", "cuda", "--backend")
PARALLEL = ("-n", str(min(12, os.cpu_count() or 1)), "--dist", "load") if importlib.util.find_spec("xdist") else ()
PYTEST = (PYTHON, "-m", "pytest", "-m", "gpu", "--gpu-check", "-q", "--tb=short", "-p", "no:cacheprovider", *PARALLEL)
OPERATORS = (
    PYTHON, "-m", "spatial_mamba.kernels.benchmark", "--device", "cuda", "--seconds", "0.3", "--limit", "{seconds}",
    "--out",
)  # fmt: skip
EACH_OPERATOR = ("--dtype", "bfloat16", "--cases", "*/tiny/stage1/224x224", "core/tiny/*/224x224")
CORE_IN_FULL = ("--dtype", "float32", "--cases", "core/tiny/stage1/224x224", "--implementations", "*")
MODELS = (
    PYTHON, "-m", "spatial_mamba.classification.benchmark", "--device", "cuda", "--dtype", "bfloat16", "--batch", "128",
    "--limit", "{seconds}", "--models",
)  # fmt: skip
TINY, PEERS, BASELINE = "spatial_mamba_tiny", ("swin_tiny*", "convnext_tiny"), "baseline/spatial_mamba_tiny"
TIMED = ("--seconds", "5", "--out")
COMPILED = {"inference": ("--form", "fused+compile"), "training": ("--form", "compile", "--mode", "train")}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for many processes at the same time
FEW_COMPILERS = ONE_THREAD | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}


def compile_model(model: str, purpose: str) -> Step:
    """Compile a model, next to the tests; the benchmark finds the result in PyTorch's cache."""
    out = f"{{out}}/models/compilation/{purpose}/{model.strip('*')}"
    command = (*MODELS, model, *COMPILED[purpose], "--seconds", "0.1", "--out", out)
    return Step(f"models, compilation of {model} for {purpose}", command, 300, FEW_COMPILERS, "tests")


# The first step finds what would make the others fail. What takes the CPU's time runs at the same time. Benchmarks have
# the GPU to themselves.
STEPS = [
    Step("build", (*KERNELS, "build", "cuda", "--missing"), 120),
    Step("self-test, report", KERNELS, 300, together="tests"),
    Step("self-test", (*SELF_TEST, "cuda", "triton"), 300, ONE_THREAD, "tests"),
    Step("tests", (*PYTEST, *gpu_tests()), 300, ONE_THREAD, "tests"),
    *(sanitize("memcheck", *each) for each in itertools.product(("cuda", "triton"), ("float32", "bfloat16"))),
    *(sanitize("racecheck", *each) for each in itertools.product(("cuda", "triton"), ("float32", "bfloat16"))),
    sanitize("synccheck", "cuda", "float32"),
    sanitize("initcheck", "cuda", "float32"),
    *(compile_model(model, purpose) for purpose in COMPILED for model in (TINY, *PEERS)),
    Step("operators", (*OPERATORS, "{out}", *EACH_OPERATOR), 75),
    Step("operators, compiled", (*OPERATORS, "{out}/compiled", *CORE_IN_FULL), 45),
    Step(
        "models, inference",
        (*MODELS, TINY, *PEERS, BASELINE, "--form", "eager", "fused", *TIMED, "{out}/models/inference"),
        50,
    ),
    Step("models, training", (*MODELS, TINY, *PEERS, BASELINE, "--mode", "train", *TIMED, "{out}/models/training"), 70),
    Step(
        "models, parts",
        (*MODELS, TINY, "--parts", "--mode", "inference", "train", "--form", "fused", *TIMED, "{out}/models"),
        60,
    ),
    *(
        Step(
            f"models, compiled {purpose}",
            (*MODELS, TINY, *PEERS, *form, *TIMED, f"{{out}}/models/compiled_{purpose}"),
            75,
        )
        for purpose, form in COMPILED.items()
    ),
]


def run(steps: Sequence[Step], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[dict[str, Any]]:
    """Run all steps, even after one has failed, with the package importable from this checkout.

    Each step gets its part of the time that is left. Writes ``log.txt`` as output comes, and ``summary.json`` and
    ``summary.md`` after each step, to ``out``.

    Returns:
        For each step its name, command, result in words, seconds, whether it passed, and its last line of output.
    """
    out.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + total_seconds, list[dict[str, Any]]()
    groups = [list(group) for _, group in itertools.groupby(steps, key=lambda step: step.together or step.name)]
    parts = [max(step.seconds for step in group) for group in groups]
    with tempfile.TemporaryDirectory() as folder, (out / "log.txt").open("w", encoding="utf-8", buffering=1) as log:
        # The folder of this checkout may have any name. The CUDA toolkit's tools come last.
        Path(folder, "spatial_mamba").symlink_to(ROOT)
        tools = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
        paths = {"PYTHONPATH": (folder, os.environ.get("PYTHONPATH")), "PATH": (os.environ.get("PATH"), tools)}
        environment = {name: os.pathsep.join(filter(None, values)) for name, values in paths.items()}
        lock = Lock()

        def show(text: str) -> None:
            with lock:
                print(text, flush=True)
                print(text, file=log)

        for index, group in enumerate(groups):
            seconds = max(0.1, end - time.monotonic()) * parts[index] / sum(parts[index:])

            def run_one(step: Step, seconds: float = seconds) -> dict[str, Any]:
                return _run_step(step, out, {**os.environ, **environment}, seconds, show)

            with ThreadPoolExecutor(len(group)) as pool:
                outcomes += pool.map(run_one, group)
            _summarise(outcomes, out)
    return outcomes


def _run_step(
    step: Step, out: Path, environment: dict[str, str], seconds: float, show: Callable[[str], None]
) -> dict[str, Any]:
    places = {"out": out.resolve(), "seconds": max(1, round(PLANNED_FRACTION * seconds))}
    command = [part.format(**places) for part in step.command]
    show(f"== {step.name}, up to {seconds:.0f} s: {shlex.join(command)}")
    start, prefix, last_line = time.monotonic(), f"{step.name}: " if step.together else "", ""
    with subprocess.Popen(
        ["timeout", "--signal=KILL", str(seconds), *command],  # it also stops all processes that the command started
        cwd=ROOT,
        env={**environment, "PYTHONUNBUFFERED": "1", **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            show(f"{prefix}{line.rstrip()}")
            last_line = line.strip() or last_line
    taken = time.monotonic() - start
    result = "out of time" if taken >= seconds else f"exit {process.returncode}"
    show(f"== {step.name}: {result} after {taken:.1f} s\n")
    return dict(
        name=step.name,
        command=shlex.join(command),
        result=result,
        seconds=taken,
        passed=result == "exit 0",
        last_line=last_line,
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


@functools.cache
def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none found by nvidia-smi"


def _gpu_problem() -> str:
    """Why no step can run here; empty if they can."""
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return f"{PYTHON} cannot import PyTorch ({reason}); choose another interpreter: make gpu PYTHON=..."
    if done.stdout.strip() != "True":
        return f"PyTorch finds no usable GPU; `{shlex.join((*KERNELS, 'check', '--device', 'cpu'))}` needs none"
    return ""


def main() -> int:
    """Run the chosen steps.

    Returns:
        The exit status: 0 if all passed, 1 if one failed, 2 if none can run here.
    """
    choices = list(dict.fromkeys(step.choice for step in STEPS))
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=ROOT / "output/gpu", help="folder for the results (default: %(default)s)")
    add("--steps", nargs="+", choices=choices, metavar="STEP", default=choices, help=f"of {', '.join(choices)}")
    add("--seconds", type=float, default=TOTAL_SECONDS, help="for all steps together (default: %(default)g)")
    arguments = parser.parse_args()
    if problem := _gpu_problem():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    out = arguments.out.expanduser()
    outcomes = run([step for step in STEPS if step.choice in arguments.steps], out, arguments.seconds)
    print((out / "summary.md").read_text())
    return int(not all(outcome["passed"] for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
