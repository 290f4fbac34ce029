"""``python forking.py PACKAGE...`` imports packages once, and forks a process for each program that it is asked to run.

A request is a line of JSON: the programs that run at the same time (each a path or module with its arguments, and its
environment) and the file of their output. The answer is a line with their exit statuses.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path

from torch.multiprocessing import get_context


def run(program: list[str], environment: dict[str, str], output: str) -> None:
    """Run a program in place of this process, as ``python`` would."""
    sys.stdout = sys.stderr = Path(output).open("a", buffering=1)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    os.environ.update(environment)
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


def main() -> None:
    for package in sys.argv[1:]:
        importlib.import_module(package)
    for request in sys.stdin:
        programs, output = json.loads(request)
        processes = [
            get_context("fork").Process(target=run, args=(program, environment, output))
            for program, environment in programs
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            process.kill()  # if it hangs
        print(json.dumps([process.exitcode for process in processes]), flush=True)


if __name__ == "__main__":
    main()
