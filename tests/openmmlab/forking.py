"""Fork programs from a process that has imported their packages, which takes seconds.

``python forking.py MODULE...`` imports the modules and runs requests: a line of JSON with the programs to run at the
same time (their words and environment) and the file of their output. The answer is a line with their exit statuses.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import get_context


class Forking:
    """The process that forks; a context."""

    def __init__(self, modules: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Forking":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.__exit__(*error)

    def run(self, *program: object, processes: int = 1, status: int = 0, **environment: str) -> str:
        """Run a Python program in processes that know each other and must all end with ``status``.

        Returns:
            Their output.
        """
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        words, ranks = [str(part) for part in program], [{}]
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        request = [[(words, environment | rank) for rank in ranks], str(output)]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        printed = output.read_text()
        assert statuses == [status] * processes, printed[-3000:]
        return printed


def _run(program: list[str], environment: dict[str, str], output: str) -> None:
    sys.stdout = sys.stderr = Path(output).open("a", buffering=1)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    os.environ.update(environment)
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for request in sys.stdin:
        programs, output = json.loads(request)
        processes = [get_context("fork").Process(target=_run, args=(*program, output)) for program in programs]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 300
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()  # if it hangs
        print(json.dumps([process.exitcode for process in processes]), flush=True)


if __name__ == "__main__":
    main()
