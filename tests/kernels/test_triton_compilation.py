"""Triton's kernels compile for real GPUs, even without one: the interpreter accepts code that the compiler refuses.

Started as a program, this file drives the launches of all operators with a driver that claims to have a GPU and, in
place of running kernels, compiles them.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITY = 90  # sm_90, Hopper
SHARED_MEMORY = 232448  # bytes of a block there
MULTIPROCESSORS = 132
KERNELS = 17  # at least, of all operators


needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = set(done.stdout.split())
    assert len(compiled) >= KERNELS, compiled


@needs_triton
def test_failures_name_the_operator_and_a_way_out() -> None:
    from spatial_mamba.kernels.triton.launch import on_device_of_first

    @on_device_of_first
    def gated_norm(y: torch.Tensor, error: Exception) -> None:
        raise error

    message = "^gated_norm failed in the triton backend on cpu: ValueError: no PTX. .*SPATIAL_MAMBA_BACKEND=torch"
    with pytest.raises(RuntimeError, match=message):
        gated_norm(torch.ones(1), ValueError("no\nPTX"))
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        gated_norm(torch.ones(1), torch.OutOfMemoryError("too large"))


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """The parts of a driver that compilation needs."""

        launcher_cls = None

        class utils:  # noqa: N801, the name that Triton looks for
            @staticmethod
            def get_device_properties(device: int) -> dict[str, int]:
                return dict(
                    max_shared_mem=SHARED_MEMORY, multiprocessor_count=MULTIPROCESSORS, warpSize=32, max_num_regs=65536
                )

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.fn.__name__)
        return kernel

    driver.set_active(Driver())
    JITFunction.run = compile_only
    with torch.no_grad():
        launch_all()


def launch_all() -> None:
    """Every operator, forward and backward; the values of the tensors do not matter."""
    from spatial_mamba.kernels import triton
    from spatial_mamba.kernels.state_fusion import tap_offsets

    offsets = tap_offsets((3, 3, 3), (1, 3, 5))
    dim, rank, taps = 64, 4, torch.empty(len(offsets) // 2, 64)

    h = torch.empty(2, 14, 14, dim)
    triton.state_fusion_backward(triton.state_fusion(h, taps, offsets), h, taps, offsets)

    u, projection = torch.empty(2, 14, 14, dim).bfloat16(), torch.empty(2, 14, 14, rank + 2).bfloat16()
    core = (u, projection, torch.empty(dim, rank), *torch.empty(3, dim).unbind(), taps)
    y, row_states = triton.structure_aware_scan(*core, offsets, torch.float32)
    triton.structure_aware_scan_backward(y, *core, row_states, offsets)

    wide = torch.empty(2, 14, 14, 2 * dim).bfloat16()
    x, gate = wide.chunk(2, dim=-1)
    weight, bias = torch.empty(dim, 9), torch.empty(dim)
    for epilogue in ("none", "silu", "residual"):
        out = triton.depthwise_conv(x, weight, bias, epilogue)
        triton.depthwise_conv_backward(out, x, weight, bias, epilogue, torch.empty_like(wide)[..., :dim])
    norm = (y, gate, bias, bias, 1e-5)
    triton.gated_norm_backward(triton.gated_norm(*norm), *norm, torch.empty_like(wide)[..., dim:])
    layer = (u, bias, bias, 1e-5)
    triton.layer_norm_backward(triton.layer_norm(*layer), *layer)

    tokens, matrices = torch.empty(3, 2, dim, 100).half(), torch.empty(2, 2, 1, 16, 100).half()
    u, delta, z = tokens.unbind()
    B, C = matrices.unbind()
    D, bias = torch.empty(2, dim).unbind()
    scan = (u, delta, torch.empty(dim, 16), B, C, D, z, bias, True)
    out, last_state = triton.selective_scan(*scan)
    triton.selective_scan_backward(out, last_state, *scan)


if __name__ == "__main__":
    main()
