"""Build the wheel of a release, with portable CPU libraries for every PyTorch release: ``make wheel``.

They are compiled and loaded by a Python interpreter whose environment has one PyTorch release. Without
interpreters on the command line, temporary environments are created one after the other. The tag of the wheel names
the oldest Linux that all of them run on.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("2.6", "2.7", "2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
# Wheel tags, oldest first, each with the newest symbol versions of its systems (auditwheel's policies).
SYSTEMS = {
    "manylinux_2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)},
    "manylinux_2_31": {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12)},
    "manylinux_2_34": {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)},
    "manylinux_2_35": {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)},
    "manylinux_2_39": {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)},
}
# Run by path, since importing the package needs more than PyTorch.
BUILD = """
import runpy, sys, torch
from pathlib import Path
build = runpy.run_path(sys.argv[1])
out = Path(sys.argv[2])
try:
    build["build"](["cpu"], out=out, portable=True)
except build["BuildError"] as error:
    sys.exit(f"error: {error}")
*_, lowest = build["levels"]()
torch.ops.load_library(build["portable_folder"](out) / f"cpu-{lowest}.so")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/wheel.py", description=__doc__)
    listed = ", ".join(RELEASES)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help=f"default: environments for PyTorch {listed}")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="FOLDER")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        for python in arguments.pythons or _environments():
            python = Path(python).absolute()  # symbolic links stay: resolving them would leave the environment
            subprocess.run([python, "-c", BUILD, ROOT / "kernels/build.py", folder], check=True, cwd=folder)
        for library in Path(folder).rglob("*.so"):
            facts = json.loads(library.with_suffix(".json").read_text())
            library.with_suffix(".json").write_text(json.dumps({**facts, "system": oldest_system(library)}, indent=1))
        wheels = arguments.out.expanduser()
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, ROOT]
        subprocess.run(command, check=True, env={**os.environ, "SPATIAL_MAMBA_PORTABLE": folder})


def oldest_system(library: Path) -> str:
    """The first tag of ``SYSTEMS`` whose C and C++ libraries have all symbols that this library needs.

    Raises:
        SystemExit: if there is none.
    """
    shown = subprocess.run(["readelf", "--version-info", library], check=True, stdout=subprocess.PIPE, text=True).stdout
    needed = re.findall(r"\b([A-Z]+)_(\d+(?:\.\d+)*)\b", shown)
    for tag, newest in SYSTEMS.items():
        if all(tuple(map(int, version.split("."))) <= newest.get(name, (math.inf,)) for name, version in needed):
            return tag
    raise SystemExit(f"error: {library.name} runs on none of {', '.join(SYSTEMS)}: build it on an older system")


def _environments() -> Iterator[str]:
    for release in RELEASES:
        with TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = f"{folder}/bin/python"
            subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={release}.*"], check=True)
            yield python


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the command has already printed the error
    except OSError as error:
        sys.exit(f"error: {error}")
