"""The CUDA sources compile, and the machine code of the core's kernels keeps within its budget, without a GPU."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from spatial_mamba.kernels import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("machine_code")]

# Names and template arguments of kernels, as mangled, for bfloat16 tokens. Those of the scan have float32 results, and
# rows of whole runs (Lb1E) or any rows. Then the elements per thread in a step of the longest loop; at most, registers,
# bytes of stack for spilled ones, and instructions per element in that loop (with one step of each inner loop, and all
# branches). Up to 64, 80 and 128 registers let 32, 24 and 16 warps share a multiprocessor.
BUDGETS = {
    r"chunk_scan_kernelI13__nv_bfloat16f\w*Lb1E": (14, 80, 16, 110),
    r"chunk_scan_kernelI13__nv_bfloat16f\w*Lb0E": (14, 80, 96, 120),
    r"read_out_gradients_kernelI13__nv_bfloat16f\w*Lb1E": (7, 80, 32, 172),
    r"read_out_gradients_kernelI13__nv_bfloat16f\w*Lb0E": (7, 80, 112, 195),
    r"chunk_gradients_kernelI13__nv_bfloat16f\w*Lb1E": (14, 128, 64, 168),
    r"chunk_gradients_kernelI13__nv_bfloat16f\w*Lb0E": (14, 128, 96, 195),
    r"convolve_kernelI\w*4PairE13__nv_bfloat16Lb0E": (8, 72, 0, 22),
    r"convolve_kernelI\w*4PairE13__nv_bfloat16Lb1E": (8, 72, 0, 28),
    r"downsample_kernelI\w*4PairE13__nv_bfloat16E": (16, 80, 0, 18),
    r"\d+norm_kernelI13__nv_bfloat16S1_Lb0ELi256ELb1E": (8, 64, 0, 28),
    r"\d+norm_kernelI13__nv_bfloat16fLb1ELi256ELb1E": (8, 80, 0, 36),
    r"norm_backward_kernelI13__nv_bfloat16fLb1ELi256ELb1E": (8, 80, 0, 59),
    r"\d+bias_gelu_kernelI13__nv_bfloat16Lb1E": (8, 64, 0, 34),
    r"bias_gelu_backward_kernelI13__nv_bfloat16Lb1E": (8, 64, 0, 46),
}
OPTIMISED = ("chunk_scan", "chunk_gradients", "depthwise_conv", "downsampling", "gated_norm", "layer_norm", "mlp")
QUICK = {".cu": "--Ofast-compile=max", ".cpp": "-O0"}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The resource usage and the disassembly of all kernels; only files with a budget are optimised."""
    folder = tmp_path_factory.mktemp("cuda")
    try:
        build.prepare("cuda", ["9.0"])
    except build.BuildError as reason:
        pytest.skip(str(reason))
    run = build._run

    def run_quickly(name: str, command: Sequence[str]) -> float:
        source = Path(name)
        if source.suffix in QUICK and source.stem not in OPTIMISED:
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


@pytest.mark.parametrize("kernel", BUDGETS)
def test_machine_code_keeps_within_its_budget(dumps: tuple[str, str], kernel: str) -> None:
    usage, disassembly = dumps
    elements, registers, stack, instructions = BUDGETS[kernel]
    name = rf"\w*{kernel}\w*"
    used = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert used is not None
    assert int(used[1]) <= registers
    assert int(used[2]) <= stack
    code = re.search(rf"Function : {name}\n(.*?)(?=Function :|\Z)", disassembly, re.DOTALL)
    assert code is not None
    assert instructions * elements / 2 < longest_loop(code[1]) <= instructions * elements
