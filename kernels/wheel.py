"""Build the wheel of a release, with portable CPU libraries for every PyTorch release: ``make wheel``.

They are compiled and loaded by a Python interpreter whose environment has one PyTorch release. Without
interpreters on the command line, temporary environments are created one after the other.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = Path(__file__).parent
RELEASES = ("2.6", "2.7", "2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14")
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
    parser = argparse.ArgumentParser(prog="kernels/wheel.py", description=__doc__)
    listed = ", ".join(RELEASES)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help=f"default: environments for PyTorch {listed}")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="FOLDER")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        for python in arguments.pythons or _environments():
            python = Path(python).absolute()  # symbolic links stay: resolving them would leave the environment
            subprocess.run([python, "-c", BUILD, PACKAGE / "build.py", folder], check=True, cwd=folder)
        wheels = arguments.out.expanduser()
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, PACKAGE.parent]
        subprocess.run(command, check=True, env={**os.environ, "SPATIAL_MAMBA_PORTABLE": folder})


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
