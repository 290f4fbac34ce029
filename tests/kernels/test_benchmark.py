"""The benchmark of the kernels, and the code that it shares with the benchmark of whole models."""

import itertools
import json
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spatial_mamba.classification.benchmark import __main__ as models
from spatial_mamba.classification.benchmark import loading
from spatial_mamba.kernels.benchmark import __main__ as operators
from spatial_mamba.kernels.benchmark import implementations, measure, report
from spatial_mamba.kernels.benchmark.cases import Case, all_cases

pytestmark = pytest.mark.usefixtures("small_instruments")
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--seconds", "0.001"]
SMALL = {name: Case(name, name, batch=2, height=7, width=9, dim=6, rank=3) for name in implementations.OPERATORS}
SMALL["scan"] = replace(SMALL["scan"], d_state=4)


def counted(case: Case, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
    """Compulsory bytes of a forward pass, and of both passes, and FLOPs."""
    inputs = case.inputs(CPU, dtype)
    output, flops = measure.dry_run(implementations.OPERATORS[case.operator], **inputs)
    both = measure.compulsory_bytes(inputs.values(), output, gradients=inputs.values())
    return measure.compulsory_bytes(inputs.values(), output), both, flops


def test_bytes_and_operations_of_the_core_by_hand() -> None:
    case = Case("by hand", "core", batch=2, height=3, width=5, dim=8, rank=4)
    u, projection = 2 * 3 * 5 * 8, 2 * 3 * 5 * (4 + 2)
    weights = 8 * 4 + 3 * 8 + 3 * 8 * 9 + 3  # expansion of delta; bias, A_log and D; three 3x3 kernels; alpha
    inputs = 4 * (u + projection + weights)
    # per element: 4 multiply-adds for delta, 7 operations of the scan, 25 multiply-adds for the fusion
    assert counted(case) == (inputs + 4 * u, 2 * (inputs + 4 * u) + inputs, u * (2 * 4 + 7 + 2 * 25))
    assert counted(case, torch.bfloat16)[0] == 2 * (u + projection + u) + 4 * weights
    case = Case("by hand", "states", batch=1, height=2, width=5, dim=3)  # states come in float32
    assert counted(case, torch.bfloat16)[0] == 2 * (10 * 3 + 10 * 3 + 10) + 4 * (3 + 3) + 4 * 30


def test_cases_have_the_shapes_of_the_models() -> None:
    cases = {case.name: case for case in all_cases(batch=8)}
    assert len(cases) == 29
    stage = cases["core/base/stage3/224x224"]
    assert astuple(stage)[2:7] == (8, 14, 14, 768, 24)
    assert (cases["mixer/tiny/stage2/224x224"].dim, cases["position/tiny/stage3/224x224"].dim) == (256, 256)
    large = cases["core/tiny/stage1/2048x2048"]
    assert astuple(large)[2:7] == (1, 512, 512, 128, 4)
    assert large.cropped() == replace(large, dim=32)  # the image keeps its size
    assert stage.cropped() == stage and replace(stage, batch=128).cropped() == replace(stage, batch=55)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_implementations_compute_the_same(case: Case) -> None:
    found = implementations.implementations(case, CPU, torch.float32)
    compared = dict.fromkeys(("core", "fusion"), ("baseline, 3 convolutions", "baseline, dense 11x11"))
    compared |= dict.fromkeys(("mixer", "conv", "position", "norm"), ("library",))
    names = [implementation.name for implementation in found if implementation.name != "cpu"]  # where it is built
    reference = [] if case.operator == "layer" else ["torch"]
    assert names == [*reference, "torch.compile", *compared.get(case.operator, [])]
    check = implementations.Check(case, CPU, torch.float32)
    for implementation in (each for each in found if each.name != "torch.compile"):  # which takes a minute
        error, where = check.worst(implementation, backward=True)
        assert error < 3e-5, (implementation.name, where)
        [output] = implementation.bind(case.inputs(CPU, torch.float32), None)()
        assert not output.requires_grad


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        second = x * x * x  # the first product is still alive: 8000 bytes
        return second * x

    assert 8000 <= measure.peak_memory(call, CPU) < 8100


def test_the_worst_error_names_its_tensor() -> None:
    check = implementations.Check(SMALL["norm"], CPU, torch.float32)

    def wrong(y: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        output = implementations.OPERATORS["norm"](y, gate, weight, bias)
        return output + bias - bias.detach()  # doubles this gradient alone

    error, where = check.worst(implementations.Implementation("wrong", wrong, "torch"), backward=True)
    assert where == "gradient of bias" and error > 0.5


def test_calls_are_timed_in_turn() -> None:
    turns = []

    def clock(call: measure.Call) -> float:
        call()
        return float(len(turns))

    calls = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    timings = measure.Trial(CPU, clock, 1e-9).interleave(calls)
    assert turns == ["a", "b"] * 4  # one round of warming up
    assert timings["a"] == dict(seconds=5, lower=4, upper=6, rounds=3)


def tiring(limit: int, failure: Exception) -> measure.Call:
    """A call that works a number of times and then fails."""
    calls = itertools.count()

    def call() -> torch.Tensor:
        if next(calls) >= limit:
            raise failure
        return torch.ones(1)

    return call


@pytest.mark.parametrize(
    ("make", "key", "text"),
    [
        (lambda: tiring(0, measure.NotRunError("cannot take part")), "not_run", "cannot take part"),
        (lambda: lambda: torch.tensor(torch.nan), "failure", "FloatingPointError: the output is not finite"),
        (lambda: tiring(0, RuntimeError("tired\nand more")), "failure", "RuntimeError: tired"),
        (lambda: tiring(4, RuntimeError("tired")), "failure", "RuntimeError: tired"),  # when it is timed
        (lambda: tiring(0, torch.OutOfMemoryError("too much")), "not_run", "out of memory"),
        (lambda: tiring(4, RuntimeError("DefaultCPUAllocator: can't allocate")), "not_run", "out of memory"),
    ],
)
def test_one_that_fails_leaves_the_others(make: Callable[[], measure.Call], key: str, text: str) -> None:
    def other(row: measure.Row) -> measure.Call:
        row["family"] = "x"
        return lambda: torch.ones(250)

    makers = [("one", lambda row: make()), ("other", other)]
    one, other = measure.Trial(CPU, measure.wall_clock(CPU), 1e-9).run(makers)
    assert one[key] == text and text in one["note"] and "seconds" not in one
    assert 0 < other["lower"] <= other["seconds"] <= other["upper"]
    assert (other["name"], other["family"], other["rounds"]) == ("other", "x", 3)
    assert 1000 <= other["peak_bytes"] < 1100


def test_nothing_is_run_after_the_deadline() -> None:
    [late] = measure.Trial(CPU, measure.wall_clock(CPU), 1, deadline=0).run([("late", lambda row: torch.zeros)])
    assert late == {"name": "late", "not_run": "out of time", "note": "not run: out of time"}


def test_command_reports_a_small_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1", "--implementations", "torch", "baseline*", "--cases", "core/tiny/stage4/*"]
    assert operators.main([*QUICK, *options, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "operators.json").read_text())
    assert [result["mode"] for result in record["results"]] == ["forward", "forward+backward"]
    assert record["environment"]["torch"] == torch.__version__ and "--batch 1" in record["command"]
    for result in record["results"]:
        reference, *baselines = result["rows"]
        assert [row["name"] for row in baselines] == ["baseline, 3 convolutions", "baseline, dense 11x11"]
        assert (reference["name"], reference["times_reference"]) == ("torch", 1)
        for row in result["rows"]:
            assert row["fraction_of_copy"] == pytest.approx(result["bytes"] / row["seconds"] / result["bandwidth"])
            assert row["peak_bytes"] > 0 and row["error"] < 1e-4
    printed = capsys.readouterr().out
    assert "core/tiny/stage4/224x224, float32, forward+backward: batch 1, 7x7 tokens" in printed


def test_a_wrong_implementation_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = implementations.dense_convolution
    monkeypatch.setattr(implementations, "three_convolutions", lambda *h, **weights: torch.nan * dense(*h, **weights))
    monkeypatch.setattr(operators, "all_cases", lambda batch: [SMALL["fusion"]])
    assert operators.main([*QUICK, "--implementations", "baseline*", "--out", str(tmp_path)]) == 1
    failed, dense = json.loads((tmp_path / "operators.json").read_text())["results"][0]["rows"]
    assert failed["failure"] == "FloatingPointError: output is not finite" and "seconds" not in failed
    assert dense["error"] < 1e-5


def test_tables() -> None:
    columns = (report.Column("name", "name"), report.Column("ms", "seconds", ".1f", 1e3), report.NOTE)
    rows = [{"name": "a", "seconds": 0.0015}, {"name": "longer", "note": "failed"}]
    assert report.table("title", columns, rows).splitlines() == [
        "title",
        "",
        "| name   |  ms | note   |",
        "| ------ | --: | ------ |",
        "| a      | 1.5 |        |",
        "| longer |   - | failed |",
    ]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (operators, ["--cases", "core/huge/*"], "--cases: 'core/huge/*' matches none of core/tiny/stage1/224x224, "),
        (operators, ["--implementations", "cuda"], "--implementations: 'cuda' matches none of torch, "),
        (operators, ["--batch", "0"], "argument --batch: must be a whole number of at least 1, got '0'"),
        (operators, ["--seconds", "soon"], "argument --seconds: must be a number of seconds above 0, got 'soon'"),
        (operators, ["--out", __file__], f"--out {__file__}: cannot be written: File exists"),
        (models, ["--models", "vgg*"], "--models: 'vgg*' matches none of spatial_mamba_tiny, "),
        (models, ["--models", "resnet50", "--parts"], "--parts: only spatial_mamba_tiny, _small and _base have parts"),
        (models, ["--form", "cudagraph"], "--form cudagraph: CUDA graphs need a GPU, but the device is cpu"),
        (models, ["--form", "onnx", "--dtype", "bfloat16"], "--form onnx: exported files run in float32"),
        (models, ["--parts", "--form", "compile"], "--form compile: --parts takes eager and fused, --processes eager"),
        (models, ["--resolution", "16"], "argument --resolution: must be at least 32 pixels, got 16"),
        (loading, ["--zip"], "--zip needs the folder of the archives: add --data-path FOLDER"),
        (loading, ["--cfg", "none"], "config none: no such file"),
    ],
)
def test_wrong_options_are_one_line(
    command: ModuleType, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*QUICK, "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
