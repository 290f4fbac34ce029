"""The self-test of the backends, ``spatial-mamba kernels check``."""

import sys
from pathlib import Path

import pytest
import torch

from spatial_mamba.kernels import backends, failures, gated_norm, self_test, use_backend
from spatial_mamba.kernels.__main__ import main
from spatial_mamba.kernels.benchmark import implementations

OPERATORS = ["structure_aware_scan", "selective_scan", "state_fusion", "spatial_mixer", "depthwise_conv"]
OPERATORS += ["downsampling", "mlp", "gated_norm"]


@pytest.fixture(autouse=True)
def _own_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep failures out of the real record."""
    monkeypatch.setattr(failures, "folder", lambda: tmp_path / "failed")
    monkeypatch.setattr(backends, "_failed", ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_operator_has_a_line(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu", "--backend", "torch", "--dtype", dtype]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines] == [["torch", dtype, name, "right,"] for name in OPERATORS]


def test_wrong_and_failing_operators_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(implementations.OPERATORS, "norm", fail)
    monkeypatch.setitem(self_test.TOLERANCES, "float32", 1e-9)
    assert main(["check", "--device", "cpu", "--backend", "torch", "--dtype", "float32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["WRONG:"] * len(OPERATORS)
    assert "WRONG: small: error of " in lines[0] and lines[0].endswith(", above 1.0e-09")
    assert lines[-1].endswith("WRONG: small: RuntimeError: no luck")


def test_crashes_are_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $*; kill -s SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert not self_test._check_in_process(torch.device("cpu"), "torch", "float32")
    called, crash = capsys.readouterr().out.splitlines()
    assert called == "-m spatial_mamba.kernels check --device cpu --backend torch --dtype float32"
    assert crash == "torch   float32   crashed: exit status -11"


def test_unusable_backends_count_only_if_they_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends._missing, "cpu", "not built")
    assert main(["check", "--device", "cpu", "--backend", "cpu"]) == 1
    assert capsys.readouterr().out == "cpu     not checked: not built\n"
    assert main(["check", "--device", "cpu"]) == 2
    assert "nothing to check: only the reference implementation" in capsys.readouterr().err


@pytest.mark.skipif(bool(backends.why_not("cpu", "cpu", torch.float32)), reason="needs the cpu library")
def test_failing_backends_are_not_chosen_until_they_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(tolerance: float) -> int:
        monkeypatch.setitem(self_test.TOLERANCES, "float32", tolerance)
        return main(["check", "--device", "cpu", "--backend", "cpu", "--dtype", "float32"])

    def reload() -> None:
        monkeypatch.setattr(backends, "_failed", failures.recorded())
        backends._served.clear()

    assert check(1e-12) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"cpu     float32   no longer chosen on this device, as recorded in {failures.folder()}"
    reload()
    monkeypatch.setattr(backends, "_hinted", set())
    with pytest.warns(UserWarning, match="run on the 'torch' backend; .* failed the self-test with torch.float32: "):
        assert backends.serving("cpu", torch.float32) == "torch"
    assert backends.serving("cpu", torch.bfloat16) == "cpu"
    y = torch.randn(1, 2, 3, 8)
    norm = torch.compile(lambda y: gated_norm(y, y, y[0, 0, 0], y[0, 0, 0]), backend="eager", fullgraph=True)
    torch.testing.assert_close(norm(y), gated_norm(y, y, y[0, 0, 0], y[0, 0, 0]))
    with use_backend("cpu"):
        assert backends.serving("cpu", torch.float32) == "cpu"
    assert main([]) == 0
    assert "  cpu     on cpu   float32: failed the self-test with torch.float32: " in capsys.readouterr().out

    assert check(1e-4) == 0
    reload()
    assert backends.serving("cpu", torch.float32) == "cpu"


def test_failures_of_other_versions_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda-bfloat16-cuda-9.0", "triton-float16-cuda-9.0"):
        failures.record(name, name.partition("-")[0], failed=True)
    (failures.folder() / "cuda-float32-cuda-9.0").write_bytes(b"\xff")
    assert failures.recorded() == ("cuda-bfloat16-cuda-9.0", "triton-float16-cuda-9.0")
    monkeypatch.setattr(backends, "_failed", failures.recorded())
    monkeypatch.setitem(backends._missing, "cuda", None)
    monkeypatch.setattr(backends.native, "kernels_for", lambda capability: True)
    for capability, failed in (((9, 0), True), (None, True), ((8, 0), False)):
        assert bool(backends.why_not("cuda", "cuda", torch.bfloat16, capability)) == failed
        assert backends.why_not("cuda", "cuda", torch.float32, capability) is None
    monkeypatch.setattr(backends.native, "loaded", lambda name: {"sources": "other"})
    assert failures.recorded() == ("triton-float16-cuda-9.0",)
