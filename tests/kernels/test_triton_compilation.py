"""Triton's kernels compile for real GPUs, even without one: the interpreter accepts code that the compiler refuses.

Started as a program with the name of a backend, this file drives the launches of all operators with a driver that
claims to have GPUs and, in place of running kernels, compiles them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spatial_mamba.kernels import backends

TARGETS: dict[str, list[dict[str, Any]]] = {
    "cuda": [dict(arch=90, warp_size=32)],  # Hopper
    "hip": [dict(arch="gfx942", warp_size=64), dict(arch="gfx90a", warp_size=64)],  # MI300 and MI200
}
SHARED_MEMORY = {"cuda": 232448, "hip": 65536}  # bytes of a block
MULTIPROCESSORS = 132
KERNELS = 17  # at least, of all operators
KERNELS_OF_THE_CORE = 10  # at least; with tokens of 16 bits and matrix products, where a backend's targets differ

unusable = backends.why_not("triton", "cuda", torch.float32)
needs_triton = pytest.mark.skipif(unusable is not None, reason=str(unusable))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("backend", TARGETS)
def test_kernels_compile_without_a_gpu(backend: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, backend], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [set(line.split()) for line in done.stdout.splitlines()]
    counts = [KERNELS, *(KERNELS_OF_THE_CORE for _ in TARGETS[backend][1:])]
    assert all(len(found) >= count for found, count in zip(compiled, counts, strict=True)), compiled


@needs_triton
def test_failures_name_the_operator_and_a_way_out() -> None:
    from spatial_mamba.kernels.triton.launch import on_device_of_first

    @on_device_of_first
    def gated_norm(y: torch.Tensor, error: Exception) -> None:
        raise error

    message = (
        r"^gated_norm failed in the triton backend on cpu \(ValueError: no PTX\)\. Set SPATIAL_MAMBA_BACKEND=torch"
    )
    with pytest.raises(RuntimeError, match=message):
        gated_norm(torch.ones(1), ValueError("the source\nno PTX"))
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        gated_norm(torch.ones(1), torch.OutOfMemoryError("too large"))


def main(backend: str) -> None:
    """Compile all kernels for the first target, and those of the core for the others. Prints a line per target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    gpus = [GPUTarget(backend, **target) for target in TARGETS[backend]]
    if backend == "hip":
        torch.version.hip = "6.4"  # as in PyTorch for ROCm

    class Driver:
        """The parts of a driver that compilation needs, with one device per target."""

        launcher_cls = None
        device = 0

        class utils:  # noqa: N801, the name that Triton looks for
            @staticmethod
            def get_device_properties(device: int) -> dict[str, int]:
                return dict(
                    max_shared_mem=SHARED_MEMORY[backend],
                    multiprocessor_count=MULTIPROCESSORS,
                    warpSize=gpus[Driver.device].warp_size,
                    max_num_regs=65536,
                )

        def get_current_target(self) -> GPUTarget:
            return gpus[Driver.device]

        def get_current_device(self) -> int:
            return Driver.device

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    launch, hashes, names = JITFunction.run, set(), set()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin" if backend == "cuda" else "hsaco"]
        names.add(self.fn.__name__)
        hashes.add(kernel.hash)
        return kernel

    driver.set_active(Driver())
    JITFunction.run = compile_only
    with torch.no_grad():
        for Driver.device in range(len(gpus)):
            names.clear()
            only_core = Driver.device > 0
            launch_operators(2, only_core)
            compiled = len(hashes)
            launch_operators(16, only_core)
            assert len(hashes) == compiled, "kernels were compiled again for another batch size"
            print(*names)


def launch_operators(batch: int, only_core: bool) -> None:
    """Every operator, or only the scan with state fusion, both ways; the values of the tensors do not matter."""
    from spatial_mamba.kernels import triton
    from spatial_mamba.kernels.state_fusion import tap_offsets

    offsets = tap_offsets((3, 3, 3), (1, 3, 5))
    dim, rank, taps = 64, 4, torch.empty(len(offsets) // 2, 64)

    u, projection = torch.empty(batch, 14, 14, dim).bfloat16(), torch.empty(batch, 14, 14, rank + 2).bfloat16()
    core = (u, projection, torch.empty(dim, rank), *torch.empty(3, dim).unbind(), taps)
    y, row_states = triton.structure_aware_scan(*core, offsets, torch.float32)
    triton.structure_aware_scan_backward(y, *core, row_states, offsets)
    if only_core:
        return

    h = torch.empty(batch, 14, 14, dim)
    triton.state_fusion_backward(triton.state_fusion(h, taps, offsets), h, taps, offsets)

    wide = torch.empty(batch, 14, 14, 2 * dim).bfloat16()
    x, gate = wide.chunk(2, dim=-1)
    weight, bias = torch.empty(dim, 9), torch.empty(dim)
    for epilogue in ("none", "silu", "residual"):
        out = triton.depthwise_conv(x, weight, bias, epilogue)
        triton.depthwise_conv_backward(out, x, weight, bias, epilogue, torch.empty_like(wide)[..., :dim])
    norm = (y, gate, bias, bias, 1e-5)
    triton.gated_norm_backward(triton.gated_norm(*norm), *norm, torch.empty_like(wide)[..., dim:])
    layer = (u, bias, bias, 1e-5)
    triton.layer_norm_backward(triton.layer_norm(*layer), *layer)

    tokens, matrices = torch.empty(3, batch, dim, 100).half(), torch.empty(2, batch, 1, 16, 100).half()
    u, delta, z = tokens.unbind()
    B, C = matrices.unbind()
    D, bias = torch.empty(2, dim).unbind()
    scan = (u, delta, torch.empty(dim, 16), B, C, D, z, bias, True)
    out, last_state = triton.selective_scan(*scan)
    triton.selective_scan_backward(out, last_state, *scan)


if __name__ == "__main__":
    main(sys.argv[1])
