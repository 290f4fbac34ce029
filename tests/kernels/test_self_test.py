"""The self-test of the backends, ``spatial-mamba kernels check``."""

import sys
from pathlib import Path

import pytest
import torch

from spatial_mamba.kernels import backends, self_test
from spatial_mamba.kernels.__main__ import main
from spatial_mamba.kernels.benchmark import implementations

OPERATORS = ["structure_aware_scan", "selective_scan", "state_fusion", "spatial_mixer", "depthwise_conv"]
OPERATORS += ["downsampling", "mlp", "gated_norm"]


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
