"""The benchmark of the kernels, its arithmetic and its report, and the runner of the GPU checks."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba.kernels import gpu_check
from spatial_mamba.kernels.benchmark import competitors, measure, options, report, trial
from spatial_mamba.kernels.benchmark.__main__ import main
from spatial_mamba.kernels.benchmark.cases import Case, all_cases
from spatial_mamba.kernels.state_fusion import merge_taps

CPU = torch.device("cpu")
SMALL = [
    Case("core", "core", batch=2, height=7, width=9, dim=6, rank=3),
    Case("states", "states", batch=2, height=7, width=9, dim=6),
    Case("scan", "scan", batch=2, height=7, width=9, dim=6, d_state=4),
    Case("fusion", "fusion", batch=2, height=7, width=9, dim=6),
    Case("mixer", "mixer", batch=2, height=7, width=9, dim=6, rank=3),
    Case("conv", "conv", batch=2, height=7, width=9, dim=6),
    Case("position", "position", batch=2, height=7, width=9, dim=6),
    Case("norm", "norm", batch=2, height=7, width=9, dim=6),
]
by_operator = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.operator)


# --- what is counted --------------------------------------------------------------------------------------------------


def test_bytes_and_operations_of_the_core_by_hand() -> None:
    case = Case("by hand", "core", batch=2, height=3, width=5, dim=8, rank=4)
    u, projection = 2 * 3 * 5 * 8, 2 * 3 * 5 * (4 + 2)
    weights = 8 * 4 + 3 * 8 + 3 * 8 * 9 + 3  # expansion of the step; bias, A_log and D; three 3x3 kernels; alpha
    assert case.compulsory_bytes(torch.float32, backward=False) == 4 * (u + projection + weights + u)
    assert case.compulsory_bytes(torch.bfloat16, backward=False) == 2 * (u + projection + u) + 4 * weights
    inputs = 4 * (u + projection + weights)
    forward, backward = inputs + 4 * u, inputs + 4 * u + inputs
    assert case.compulsory_bytes(torch.float32, backward=True) == forward + backward
    # per element: 4 multiply-adds for the step, 7 operations of the scan, 25 multiply-adds for the fusion
    assert case.operations(backward=False) == u * (2 * 4 + 7 + 2 * 25)
    assert case.operations(backward=True) == 3 * case.operations(backward=False)


def test_states_are_counted_in_the_dtype_they_come_in() -> None:
    case = Case("by hand", "states", batch=1, height=2, width=5, dim=3)
    tokens, weights = 10 * 3 + 10 * 3 + 10, 3 + 3
    assert case.compulsory_bytes(torch.bfloat16, backward=False) == 2 * tokens + 4 * weights + 4 * 30


@by_operator
def test_operations_are_those_of_the_flop_formulas(case: Case) -> None:
    inputs = {name: x.to("meta") for name, x in case.inputs(CPU, torch.float32).items()}
    operators, branches = torch.ops.spatial_mamba, ([3, 3, 3], [1, 3, 5])
    kernels = [x for name, x in inputs.items() if name.startswith("kernel_")]
    with FlopCounterMode(display=False) as counter:
        if case.operator == "core":
            names = ("u", "projection", "step_weight", "step_bias", "A_log", "D")
            taps = merge_taps(kernels, inputs["alpha"], [1, 3, 5])
            operators.structure_aware_scan(*(inputs[name] for name in names), taps, *branches, torch.float32)
        elif case.operator == "mixer":
            taps = merge_taps(kernels, inputs["alpha"], [1, 3, 5])
            conv = (inputs["conv_weight"].flatten(1), inputs["conv_bias"])
            core = (inputs[name] for name in ("projection_weight", "step_weight", "step_bias", "A_log", "D"))
            norm = (inputs["norm_weight"], inputs["norm_bias"])
            operators.spatial_mixer(inputs["xz"], *conv, *core, taps, *norm, *branches, 1e-5)
        elif case.operator in ("conv", "position"):
            operators.depthwise_conv(inputs["x"], inputs["conv_weight"].flatten(1), inputs["conv_bias"], "silu")
        elif case.operator == "norm":
            operators.gated_norm(*inputs.values(), 1e-5)
        elif case.operator == "fusion":
            taps = merge_taps(kernels, inputs["alpha"], [1, 3, 5])
            operators.state_fusion(inputs["h"].permute(0, 2, 3, 1), taps, *branches)
        else:
            u, delta, A, B, C, D, z, bias = (
                inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
            )
            B, C = (None if x is None else x[:, None] for x in (B, C))
            operators.selective_scan(u, delta, A, B, C, D, z, bias, True)
    assert counter.get_total_flops() == case.operations(backward=False)


def test_cases_have_the_shapes_of_the_models() -> None:
    cases = {case.name: case for case in all_cases(batch=8)}
    assert len(cases) == 25
    stage = cases["core/base/stage3/224x224"]
    assert (stage.batch, stage.height, stage.width, stage.dim, stage.rank) == (8, 14, 14, 768, 24)
    assert (cases["mixer/tiny/stage2/224x224"].dim, cases["position/tiny/stage3/224x224"].dim) == (256, 256)
    large = cases["core/tiny/stage1/2048x2048"]
    assert (large.batch, large.height, large.width, large.dim, large.rank) == (1, 512, 512, 128, 4)


def test_a_crop_keeps_the_image() -> None:
    case = Case("large", "core", batch=8, height=100, width=100, dim=128, rank=4)
    assert case.cropped(3_000_000) == Case("large", "core", batch=2, height=100, width=100, dim=128, rank=4)
    assert case.cropped(700_000) == Case("large", "core", batch=1, height=100, width=100, dim=64, rank=4)


# --- who is timed -----------------------------------------------------------------------------------------------------


@by_operator
def test_competitors_compute_the_same(case: Case) -> None:
    inputs, grad_output = case.inputs(CPU, torch.float32), case.grad_output(CPU, torch.float32)
    doubles = {name: x.double() for name, x in inputs.items()}
    expected = competitors.definition(case).bind(case, doubles, grad_output.double(), backward=True)()
    names = ["output", *inputs]
    entrants = [competitors.definition(case), *competitors.published(case, CPU, torch.float32)]
    others = {"core": 3, "fusion": 2, "mixer": 1, "conv": 1, "position": 1, "norm": 1}
    assert len(entrants) == 1 + others.get(case.operator, 0)
    for entrant in entrants:
        found = entrant.bind(case, inputs, grad_output, backward=True)()
        error, where = measure.worst_error(names, found, expected)
        assert error < 1e-5, (entrant.name, where)
        [output] = entrant.bind(case, inputs, grad_output, backward=False)()
        torch.testing.assert_close(output, found[0])
        assert not output.requires_grad


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        first = x * x
        second = first * x  # both are alive: 8000 bytes
        del first
        return second * x

    assert 8000 <= measure.peak_memory(call, CPU) < 8100


def test_worst_error_names_the_tensor_and_never_passes_nan() -> None:
    expected = [torch.tensor([4.0, 1.0]), torch.tensor([10.0])]
    error, where = measure.worst_error("ab", [torch.tensor([4.0, 1.5]), torch.tensor([10.5])], expected)
    assert (error, where) == (0.125, "a")
    error, where = measure.worst_error("ab", [torch.tensor([4.0, 1.0]), torch.tensor([torch.nan])], expected)
    assert (error, where) == (float("inf"), "b")


def test_calls_are_timed_in_turn() -> None:
    turns = []

    def clock(call: measure.Call, launch: float) -> tuple[float, float]:
        call()
        return float(len(turns)), 0.0

    timings = measure.interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, clock, 1e-9)
    assert turns == ["a", "b"] * 4  # one round of warming up
    assert timings["a"] == measure.Timing(lower=4, median=5, upper=6, launch=0, rounds=3)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_reports_a_small_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "MEMORY_COPY_BYTES", 2**20)
    monkeypatch.setattr(measure, "PEAK_SIZES", {"cpu": 64})
    # Not in the process of the other tests: it would change how they get their memory.
    options = ["--device", "cpu", "--no-keep-freed-memory", "--batch", "1", "--seconds", "0.01", "--backends", "torch"]
    assert main([*options, "--cases", "core/tiny/stage4/*", "--out", str(tmp_path)]) == 0

    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert [result["mode"] for result in record["results"]] == ["forward", "forward+backward"]
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["cpu"]
    for result in record["results"]:
        assert [row["competitor"] for row in result["rows"]] == [
            "torch", "published, 3 convolutions", "published, dense 11x11", "separate operators",
        ]  # fmt: skip
        for row in result["rows"]:
            assert 0 < row["lower"] <= row["median"] <= row["upper"]
            assert row["rounds"] >= 3
            assert row["bandwidth"] == pytest.approx(result["bytes"] / row["median"])
            own_size = result["copies"][trial.OWN_COPY]
            assert row[f"share of {trial.OWN_COPY}"] == pytest.approx(row["bandwidth"] / own_size["bandwidth"])
            assert row["peak_bytes"] >= own_size["bytes"]
            assert row["error"] < 1e-4
    printed = capsys.readouterr().out
    assert "core/tiny/stage4/224x224  float32  forward+backward\n" in printed
    assert (tmp_path / "benchmark.txt").read_text().strip() in printed
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def out_of_order(h: torch.Tensor, *_: object) -> torch.Tensor:
    raise RuntimeError("out of order\nand more")


def not_a_number(h: torch.Tensor, kernels: list[torch.Tensor], alpha: torch.Tensor) -> torch.Tensor:
    return torch.nan * competitors.dense_convolution(h, kernels, alpha)


@pytest.mark.parametrize(
    ("fusion", "failure"), [(out_of_order, "RuntimeError: out of order"), (not_a_number, "output is not finite")]
)
def test_a_failing_competitor_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, fusion: Callable[..., torch.Tensor], failure: str
) -> None:
    monkeypatch.setattr(trial, "MEMORY_COPY_BYTES", 2**20)
    monkeypatch.setattr(competitors, "three_convolutions", fusion)
    bench = trial.Bench(trial.Choices(CPU, backends=["torch"], seconds=0.001))
    forward, _ = bench.run(SMALL[3], torch.float32)
    definition, failed, dense = forward["rows"]
    assert failed["failure"] == failure
    assert definition["faster_than_definition"] == 1
    assert dense["error"] < 1e-5
    assert f"failed: {failure}" in report.table(forward)


def test_time_per_token_is_compared_between_images() -> None:
    results = [
        {"case": {"name": f"core/tiny/stage1/{image}", "batch": batch, "height": side, "width": side}}
        | {"dtype": "float32", "mode": "forward", "rows": [{"competitor": "cpu", "median": seconds}]}
        for image, batch, side, seconds in (("224x224", 2, 56, 2 * 56 * 56), ("2048x2048", 1, 512, 1.5 * 512 * 512))
    ]
    assert report.per_token(results) == [
        "core/tiny/stage1  float32  forward  cpu: a token at 2048x2048 takes 1.50 times that at 224x224"
    ]
    assert report.per_token(results[:1]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "core/huge/*"], "--cases: 'core/huge/*' matches none of core/tiny/stage1/224x224, "),
        (["--backends", "metal"], "--backends: 'metal' is none of cpu, cuda, triton, torch"),
        (["--backends", "cuda"], "--backends: cuda cannot be timed in float32: "),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--batch", "0"], "argument --batch: must be a whole number of at least 1, got '0'"),
        (["--seconds", "soon"], "argument --seconds: must be a number of seconds above 0, got 'soon'"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def refuse_to_write(dir: Path) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_cannot_be_written_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options.tempfile, "TemporaryFile", refuse_to_write)  # else root may write everywhere
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--no-keep-freed-memory", "--out", str(tmp_path)])
    assert capsys.readouterr().err == f"error: --out {tmp_path}: cannot be written: Permission denied\n"


def test_roofline_leaves_out_what_was_not_timed(tmp_path: Path) -> None:
    row = {"competitor": "torch", "median": 1.0}
    result = {
        "case": {"name": "core/tiny/stage1/224x224"},
        "dtype": "float32",
        "mode": "forward+backward",
        "bytes": 10,
        "operations": 100,
        "copies": {trial.MEMORY_COPY: {"bandwidth": 1e9}},
        "rows": [row, {"competitor": "cuda", "failure": "out of order"}],
    }
    report.roofline(tmp_path / "roofline.png", [result], peak=1e12)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


# --- make gpu ---------------------------------------------------------------------------------------------------------


def test_gpu_check_goes_on_after_failures(tmp_path: Path) -> None:
    python = sys.executable
    show_options = (
        "import importlib.util, os, sys; where = importlib.util.find_spec('spatial_mamba').origin;"
        "print(*sys.argv[1:], os.environ['COLOUR'], os.path.samefile(os.path.dirname(where), os.getcwd()))"
    )
    outcomes = gpu_check.run(
        [
            gpu_check.Step("fails", (python, "-c", "print('about to fail'); raise SystemExit(3)"), 20),
            gpu_check.Step("hangs", (python, "-c", "import time; time.sleep(60)"), 0.5),
            gpu_check.Step("absent", ("no-such-command",), 20),
            gpu_check.Step("works", (python, "-c", show_options, "{seconds}", "{out}/part"), 20, {"COLOUR": "blue"}),
            gpu_check.Step("too late", (python, "--version"), 0),
            gpu_check.Step("not needed", (python, "--version"), 0, optional=True),
        ],
        tmp_path,
    )
    assert [(outcome.status, outcome.passed) for outcome in outcomes] == [
        ("exit 3", False),
        ("ended after its 0.5 s", False),
        ("not started: No such file or directory: no-such-command", False),
        ("exit 0", True),
        ("no time left", False),
        ("no time left", True),
    ]
    assert 0.5 <= outcomes[1].seconds < 10
    log = (tmp_path / "log.txt").read_text()
    assert "about to fail" in log
    assert f"15 {tmp_path}/part blue True" in log
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["passed"]
    assert [step["name"] for step in summary["steps"]] == [outcome.name for outcome in outcomes]
    fails = next(line for line in (tmp_path / "summary.md").read_text().splitlines() if "| fails |" in line)
    assert fails.startswith("| fails | **failed**: exit 3 |")
    assert fails.endswith("| about to fail |")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json", "summary.md"]


def test_gpu_check_ends_in_time(tmp_path: Path) -> None:
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    outcomes = gpu_check.run([gpu_check.Step("first", sleep, 30), gpu_check.Step("second", sleep, 30)], tmp_path, 0.5)
    assert [outcome.status for outcome in outcomes] == ["ended after its 0.5 s", "no time left"]


def test_gpu_check_starts_by_its_path() -> None:
    command = [sys.executable, gpu_check.__file__, "--help"]
    assert "folder for the results" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_gpu_check_covers_every_kind_of_check() -> None:
    steps = gpu_check.steps()
    commands = [" ".join(step.command) for step in steps]
    for part in (
        "kernels build",
        "pytest -m gpu",
        "memcheck",
        "racecheck",
        "kernels.benchmark --device cuda",
        "classification.benchmark --device cuda",
        "classification.benchmark.budget --device cuda",
    ):
        assert any(part in command for command in commands), part
    assert not any(step.optional for step in steps if "pytest" in step.command or step.name.startswith("models"))


def test_gpu_tests_are_found_without_the_trainers_packages() -> None:
    """A file that needs them is left out as a whole, where the machine has PyTorch, timm and little else."""
    files = gpu_check._files_with_gpu_tests()
    code = (
        "import sys, pytest; sys.modules.update(dict.fromkeys(('yacs', 'fvcore', 'mmengine')));"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *files]
    found = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT)
    assert found.returncode == 0, found.stdout
    assert "test_gpu_runs_the_forms" in found.stdout
