"""The CUDA sources compile, and the machine code of the core's kernels keeps within its budget, without a GPU."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from spatial_mamba.kernels import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("machine_code")]

# For bfloat16 tokens and float32 results, with rows of whole runs or any rows: elements per thread in a chunk of rows;
# at most, the registers that let three or two blocks share a multiprocessor, bytes of stack for spilled registers, and
# instructions per element in the loop over chunks (with one step of each inner loop, and all branches).
BUDGETS = {
    ("chunk_scan_kernel", "whole runs"): (14, 80, 16, 110),
    ("chunk_scan_kernel", "any rows"): (14, 80, 96, 120),
    ("read_out_gradients_kernel", "whole runs"): (7, 80, 32, 172),
    ("read_out_gradients_kernel", "any rows"): (7, 80, 112, 195),
    ("chunk_gradients_kernel", "whole runs"): (14, 128, 64, 168),
    ("chunk_gradients_kernel", "any rows"): (14, 128, 96, 195),
}
QUICK = {".cu": "--Ofast-compile=max", ".cpp": "-O0"}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The resource usage and the disassembly of all kernels; only those with a budget are optimised."""
    folder = tmp_path_factory.mktemp("cuda")
    try:
        build.prepare("cuda", ["9.0"])
    except build.BuildError as reason:
        pytest.skip(str(reason))
    run = build._run

    def run_quickly(name: str, command: Sequence[str]) -> float:
        source = Path(name)
        if source.suffix in QUICK and not any(f" {kernel}(" in source.read_text() for kernel, _ in BUDGETS):
            command = [*command, QUICK[source.suffix]]
        return run(name, command)

    with pytest.MonkeyPatch.context() as patch:
        if build.capability(build.find_toolkit().version) >= (13, 0):  # which know the option
            patch.setattr(build, "_run", run_quickly)
        build.build(["cuda"], ["9.0"], folder)
    cuobjdump = f"{pytest.importorskip('triton.backends.nvidia').__path__[0]}/bin/cuobjdump"
    commands = ([cuobjdump, option, folder / "cuda.so"] for option in ("--dump-resource-usage", "--dump-sass"))
    usage, code = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands)
    return usage, code


def longest_loop(code: str) -> int:
    """The number of instructions in the longest loop of a kernel's disassembly."""
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    position = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    jumps = ((i, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for i, (_, text) in enumerate(instructions))
    return max(i - position[int(jump[1], 16)] + 1 for i, jump in jumps if jump and int(jump[1], 16) in position)


@pytest.mark.parametrize(("kernel", "rows"), BUDGETS)
def test_machine_code_keeps_within_its_budget(dumps: tuple[str, str], kernel: str, rows: str) -> None:
    usage, disassembly = dumps
    elements, registers, stack, instructions = BUDGETS[kernel, rows]
    name = rf"\w*{kernel}I13__nv_bfloat16f\w*Lb{int(rows == 'whole runs')}E\w*"
    used = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert used is not None
    assert int(used[1]) <= registers
    assert int(used[2]) <= stack
    code = re.search(rf"Function : {name}\n(.*?)(?=Function :|\Z)", disassembly, re.DOTALL)
    assert code is not None
    assert 50 * elements < longest_loop(code[1]) <= instructions * elements
