"""Run fast tests with the oldest allowed, the pinned and the newest packages: ``python tests/versions.py [NAME ...]``.

Each combination has its own environment and CPU library in ``output/versions``, created on first use. Interpreters are
found on PATH (``python3.10``). The last lines of output are the table in the installation guide.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "output" / "versions"
EXTRAS = ["-e", ".[dev,openmmlab]"]
PROJECT = (ROOT / "pyproject.toml").read_text().partition("[project]")[2].partition("[project.scripts]")[0]
LOWEST = [f"{name}=={version}.*" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT)]
COMBINATIONS = {  # name: (Python, calls of pip install)
    # In one call, which cannot replace the oldest packages by newer ones.
    "oldest": ("3.10", [[*LOWEST, *EXTRAS]]),
    "pinned": ("3.11", [["-r", "requirements.txt"], ["-r", "detection/requirements.txt"], ["--no-deps", "-e", "."]]),
    "newest": ("3.13", [["torch", "torchvision"], EXTRAS]),
}
TESTS = {  # folder: tests
    "kernels": (
        "build depthwise_conv downsampling gated_norm layer_norm mlp recurrence selective_scan spatial_mixer "
        "state_fusion structure_aware_scan"
    ),
    "classification": (
        "engine export fused initialisation optim pytorch_tools recomputation spatial_mamba timm visualize "
        "weight_files weights"
    ),
    "openmmlab": "detection mmcv_operators",
}
SHOWN = ("torch", "torchvision", "triton", "timm", "numpy", "mmcv-lite")


def prepare(name: str) -> Path:
    """Create the environment of a combination, with all packages and a CPU library; return its interpreter."""
    version, installs = COMBINATIONS[name]
    folder = FOLDER / name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    sources = max(path.stat().st_mtime for path in (ROOT / "kernels/csrc/cpu").iterdir())
    if ready.exists() and ready.stat().st_mtime > sources:
        return python
    base = shutil.which(f"python{version}")
    if base is None:
        sys.exit(f"error: python{version} is not on PATH; {name} needs it")
    if not ready.exists():
        subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
        for packages in installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, cwd=ROOT)
    subprocess.run([python, "-m", "spatial_mamba.kernels", "build", "cpu"], check=True, env=environment(name))
    ready.touch()
    return python


def environment(name: str) -> dict[str, str]:
    return {**os.environ, "SPATIAL_MAMBA_LIB": str(FOLDER / name / "native"), "OMP_NUM_THREADS": "1"}


def run(name: str) -> str:
    """Run the tests, and return their row of the table."""
    python = prepare(name)
    versions = "import sys, importlib.metadata as m; print(sys.version.split()[0])\n"
    versions += f"for name in {SHOWN}:\n try: print(m.version(name))\n except m.PackageNotFoundError: print('none')"
    cells = subprocess.run([python, "-c", versions], check=True, capture_output=True, text=True).stdout.split()
    start = time.monotonic()
    tests = [f"tests/{folder}/test_{test}.py" for folder, tests in TESTS.items() for test in tests.split()]
    with subprocess.Popen(
        [python, "-m", "pytest", "-q", *tests], cwd=ROOT, env=environment(name), stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    minutes = (time.monotonic() - start) / 60
    counts = dict(reversed(pair) for pair in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line))
    outcome = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"| {name} | {' | '.join(cells)} | {outcome} | {minutes:.1f} min |"


def main() -> int:
    names = sys.argv[1:] or list(COMBINATIONS)
    if unknown := set(names) - set(COMBINATIONS):
        sys.exit(f"error: {', '.join(sorted(unknown))}: choose from {', '.join(COMBINATIONS)}")
    rows = [run(name) for name in names]
    print(f"| | Python | {' | '.join(SHOWN)} | fast tests | time |")
    print("| --- " * (len(SHOWN) + 4) + "|")
    print("\n".join(rows))
    return int(any(re.search("failed|error|\\|  \\|", row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
