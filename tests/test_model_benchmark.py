"""The benchmark of whole models: who takes part, what is measured, and what is reported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.benchmark import competitors, energy, report, roster, trial
from spatial_mamba.classification.benchmark.__main__ import main
from spatial_mamba.classification.benchmark.flops import forward_flops
from spatial_mamba.classification.benchmark.published import as_published
from spatial_mamba.kernels.benchmark import measure

CPU = torch.device("cpu")
# Not in the process of the other tests: it would change how they get their memory.
QUICK = ["--device", "cpu", "--no-keep-freed-memory", "--seconds", "0.001"]
TIMING = measure.Timing(lower=1, median=2, upper=3, launch=0, rounds=3)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PEAK_SIZES", {"cpu": 64, "cuda": 64})


def small_model(drop_path_rate: float = 0.0) -> SpatialMamba:
    """All weights of the mixer differ from their initial values, which hide what is done with them."""
    torch.manual_seed(0)
    model = SpatialMamba(num_classes=5, dims=16, depths=(1, 1), drop_path_rate=drop_path_rate)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "state_fusion" in name or parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return model


def create_small(model: roster.Model, resolution: int) -> nn.Module:
    if model.is_peer:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)
        )
    return SpatialMamba(dims=16, depths=(1, 1))


# --- who takes part ---------------------------------------------------------------------------------------------------


def test_published_formulation_computes_the_same_in_inference() -> None:
    images = torch.randn(2, 3, 64, 48)
    expected = small_model().eval()(images)
    published = as_published(small_model()).eval()
    assert "dense" not in "".join(published.state_dict())
    torch.testing.assert_close(published(images), expected, rtol=1e-4, atol=1e-5)


def test_published_formulation_computes_the_same_in_training() -> None:
    images, labels = torch.randn(3, 3, 64, 48), torch.tensor([0, 3, 1])
    gradients = []
    for model in (small_model(), as_published(small_model())):
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        gradients.append(dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()))))  # noqa: B905
    ours, published = gradients
    for name, gradient in ours.items():
        torch.testing.assert_close(published[name], gradient, rtol=1e-3, atol=1e-5)


def test_published_formulation_drops_paths() -> None:
    model = as_published(small_model(drop_path_rate=0.9)).train()
    block, tokens = model.layers[1].blocks[0], torch.ones(64, 4, 4, 32)
    assert block.residual_sum.drop_prob > 0
    outputs = block(tokens).flatten(1).detach()
    assert len(torch.unique(outputs.round(decimals=3), dim=0)) > 1  # equal samples come out different


def test_models_are_chosen_by_name_and_pattern() -> None:
    names = [model.name for model in roster.choose(["swin_tiny*", "spatial_mamba_*", "*tiny*"], peers=True)]
    assert names[:4] == [
        "swin_tiny_patch4_window7_224", "spatial_mamba_tiny", "spatial_mamba_small", "spatial_mamba_base",
    ]  # fmt: skip
    assert names[4:] == ["convnext_tiny", "mambaout_tiny", "published/spatial_mamba_tiny"]
    assert all("spatial_mamba" in model.name for model in roster.choose(["*"], peers=False))
    assert all(timm.is_model(model.name.removeprefix("published/")) for model in roster.MODELS)


def test_forms_that_a_model_lacks_are_run_without_it_and_once() -> None:
    models = roster.choose(["spatial_mamba_tiny", "resnet50", "published/spatial_mamba_tiny"], peers=True)
    choices = trial.Choices(CPU, models, forms=["eager", "fused", "fused+compile"])

    def forms(mode: str) -> list[tuple[str, str]]:
        return [(model.name, form) for model, form in choices.entrants(mode)]

    others = [("resnet50", "eager"), ("resnet50", "compile"), ("published/spatial_mamba_tiny", "eager")]
    ours = [("spatial_mamba_tiny", form) for form in ("eager", "fused", "fused+compile")]
    assert forms("inference") == ours + others
    assert forms("train") == [("spatial_mamba_tiny", "eager"), ("spatial_mamba_tiny", "compile"), *others]


def test_swin_is_made_for_the_size() -> None:
    [swin] = roster.choose(["swin_tiny*"], peers=True)
    with torch.device("meta"):
        assert swin.create(256).patch_embed.img_size == (256, 256)


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_flops_count_a_multiply_add_as_two() -> None:
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False).train()
    assert forward_flops(convolution, 10) == 2 * 10 * 10 * 8 * 3 * 9
    assert convolution.training
    with torch.device("meta"):
        model = timm.create_model("spatial_mamba_tiny")
    # 4.5 GFLOPs as published, a multiply-add counted as one; element-wise operations are not counted here
    assert forward_flops(model.to_empty(device="cpu"), 224) == pytest.approx(2 * 4.5e9, rel=0.03)


class FakeNvml:
    """The driver's library, of a GPU that has used 2.5 J."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: Any, handle: Any) -> int:  # noqa: N802
        return 0 if name.value == b"GPU-1234" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, millijoules: Any) -> int:  # noqa: N802
        millijoules._obj.value = 2500
        return 0


def test_energy_of_a_gpu_is_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda _: FakeNvml())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    assert energy.counter_for(torch.device("cuda")).joules() == 2.5
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="5678"))
    with pytest.raises(energy.NoCounterError, match="nvmlDeviceGetHandleByUUID fails with NVML status 6"):
        energy.counter_for(torch.device("cuda"))
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetHandleByUUID")
    with pytest.raises(energy.NoCounterError, match="this driver's NVML has no nvmlDeviceGetHandleByUUID"):
        energy.counter_for(torch.device("cuda"))


class FakeCounter:
    source, shortest = "a fake", 1e-9

    def __init__(self) -> None:
        self.used = 100.0

    def joules(self) -> float:
        return self.used


def test_energy_is_the_mean_over_calls() -> None:
    counter = FakeCounter()

    def call() -> None:
        counter.used += 3.0

    assert energy.joules_per_call(call, counter, CPU, 0.001) == pytest.approx(3)


def test_energy_of_the_processor_survives_an_overflow(tmp_path: Path) -> None:
    for i in range(2):
        package = tmp_path / f"intel-rapl:{i}"
        package.mkdir()
        (package / "name").write_text(f"package-{i}\n")
        (package / "max_energy_range_uj").write_text("1000000\n")
        (package / "energy_uj").write_text("900000\n")
    for domain, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys")):  # would count twice
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "name").write_text(f"{name}\n")
    counter = energy.CpuCounter(tmp_path)
    assert counter.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("950000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100000\n")
    assert counter.joules() == pytest.approx(0.05 + 0.2)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(energy.NoCounterError, match="RAPL's energy_uj cannot be read: No such file"):
        counter.joules()


def test_energy_that_is_not_told_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(energy.NoCounterError, match="no RAPL counters"):
        energy.CpuCounter(tmp_path)


def run_one(monkeypatch: pytest.MonkeyPatch, create: Callable, mode: str = "inference") -> dict[str, Any]:
    """The row of ResNet-50's stand-in, beside a competitor that works."""
    works = create_small
    monkeypatch.setattr(
        roster.Model, "create", lambda model, size: create(size) if model.name == "resnet50" else works(model, size)
    )
    models = roster.choose(["convnext_tiny", "resnet50"], peers=True)
    bench = trial.Bench(trial.Choices(CPU, models, seconds=0.001))
    [result] = bench.run(mode, "float32", 32, [3])
    works_row, row = result["rows"]
    assert works_row["median"] > 0
    report.add_ratios(result["rows"], "convnext_tiny")
    return row | {"table": report.table(result)}


def test_a_model_that_cannot_take_the_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(resolution: int) -> nn.Module:
        raise AssertionError(f"no {resolution}")

    row = run_one(monkeypatch, create)
    assert row["not_run"] == "cannot run 32x32 images: AssertionError: no 32"
    assert "failure" not in row
    monkeypatch.setattr(competitors, "BASE_RESOLUTION", 32)  # which all can take
    row = run_one(monkeypatch, create)
    assert row["failure"] == "AssertionError: no 32" and "not_run" not in row


def test_our_own_model_takes_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: object) -> nn.Module:
        raise ValueError("no")

    monkeypatch.setattr(roster.Model, "create", create)
    models = roster.choose(["spatial_mamba_tiny"], peers=True)
    [result] = trial.Bench(trial.Choices(CPU, models, seconds=0.001)).run("inference", "float32", 32, [1])
    assert result["rows"][0]["failure"] == "ValueError: no"


class TooLarge(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:  # the layouts were tried with fewer
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return super().forward(x)


def test_a_batch_that_is_too_large_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    row = run_one(monkeypatch, lambda _: TooLarge(nn.Conv2d(3, 1000, 32), nn.Flatten()), "train")
    assert row["not_run"] == "out of memory"
    assert "failure" not in row


class NotANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1000, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan * self.layer(x).flatten(1)


class OutOfOrder(NotANumber):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise RuntimeError("out of order\nand more")
        return super().forward(x)


class Tiring(NotANumber):
    """Works until it is timed."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            self.passes += 1
            if self.passes > 2:  # warming up, and measuring memory
                raise RuntimeError("tired")
        return self.layer(x).flatten(1)


@pytest.mark.parametrize("first_failure", ["timing", "energy"])
def test_one_that_fails_late_leaves_the_others(monkeypatch: pytest.MonkeyPatch, first_failure: str) -> None:
    if first_failure == "energy":
        monkeypatch.setattr(trial.measure, "interleave", lambda calls, *_: dict.fromkeys(calls, TIMING))
    monkeypatch.setattr(trial, "counter_for", lambda _: FakeCounter())
    row = run_one(monkeypatch, lambda _: Tiring())
    assert row["failure"] == "RuntimeError: tired"
    assert ("median" in row) == (first_failure == "energy")


@pytest.mark.parametrize("mode", competitors.MODES)
@pytest.mark.parametrize(
    ("create", "failure"), [(NotANumber, "the output is not finite"), (OutOfOrder, "RuntimeError: out of order")]
)
def test_a_failing_competitor_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, create: type[nn.Module], failure: str, mode: str
) -> None:
    row = run_one(monkeypatch, lambda _: create(), mode)
    assert failure in row["failure"]
    assert f"failed: {row['failure']}" in row["table"]


# --- what is reported -------------------------------------------------------------------------------------------------


def row_of(model: str, form: str, median: float, **more: Any) -> dict[str, Any]:
    return {"competitor": f"{model}, {form}", "model": model, "form": form, "median": median} | more


def test_times_are_divided_by_the_reference_in_the_same_form() -> None:
    rows = [
        row_of("ours", "eager", 3.0),
        row_of("ours", "fused", 2.0),
        row_of("peer", "eager", 6.0),
        row_of("peer", "compile", 4.0),
        {"competitor": "broken, eager", "model": "broken", "form": "eager", "failure": "it is"},
    ]
    report.add_ratios(rows, "ours")
    assert [row.get("times_reference") for row in rows] == [1, 1, 2, 4 / 3, None]
    assert rows[2]["relative_to"] == "ours, eager"
    report.add_ratios(rows, "peer")
    assert [row.get("times_reference") for row in rows] == [0.5, pytest.approx(1 / 3), 1, 1, None]
    report.add_ratios(rows, "broken")
    assert rows[0]["times_reference"] is None


def test_cost_per_pixel_is_relative_to_224() -> None:
    def result(resolution: int, images: int, seconds: float, peak: float | None) -> dict[str, Any]:
        pixels = images * resolution**2
        row = row_of("ours", "eager", seconds * pixels, seconds_per_pixel=seconds)
        row["peak_bytes"] = None if peak is None else peak * pixels
        return dict(mode="inference", dtype="float32", batch=8, images=images, resolution=resolution, rows=[row])

    costs = report.per_pixel([result(224, 8, 2.0, 50), result(1024, 1, 3.0, 40), result(512, 2, 1.0, None)])
    assert [cost["resolution"] for cost in costs] == [512, 1024]
    assert costs[1]["times_seconds"] == 1.5
    assert costs[1]["times_bytes"] == pytest.approx(0.8)
    [table] = report.per_pixel_tables(costs)
    heading, sizes, ours = table.splitlines()
    assert heading.startswith("inference  float32  batch 8: ")
    assert sizes.split() == ["512x512", "1024x1024"]
    assert ours.split() == ["ours,", "eager", "0.50,", "-", "1.50,", "0.80"]
    assert report.per_pixel([result(512, 2, 1.0, 1)]) == []


def test_command_times_models_as_they_are(tmp_path: Path) -> None:
    options = ["--models", "spatial_mamba_tiny", "--no-peers", "--batch", "1", "--resolution", "32"]
    assert main([*QUICK, *options, "--out", str(tmp_path)]) == 0
    [result] = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    [row] = result["rows"]
    weights = 4 * sum(p.numel() for p in timm.create_model("spatial_mamba_tiny").parameters())
    assert weights <= row["weight_bytes"] < 1.01 * weights  # and statistics of BatchNorm


def test_command_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(roster.Model, "create", create_small)
    options = ["--models", "spatial_mamba_tiny", "resnet50", "--form", "eager", "fused", "--relative-to", "resnet50"]
    assert main([*QUICK, *options, "--batch", "1", "--resolution", "64", "224", "--out", str(tmp_path)]) == 0

    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["environment"]["timm"] == timm.__version__
    assert "--relative-to resnet50" in record["command"]
    assert [result["resolution"] for result in record["results"]] == [64, 224]
    for result in record["results"]:
        assert [row["competitor"] for row in result["rows"]] == [
            "spatial_mamba_tiny, eager", "spatial_mamba_tiny, fused", "resnet50, eager",
        ]  # fmt: skip
        reference = result["rows"][-1]
        for row in result["rows"]:
            assert 0 < row["lower"] <= row["median"] <= row["upper"]
            assert row["images_per_second"] == pytest.approx(1 / row["median"])
            assert row["times_reference"] == pytest.approx(row["median"] / reference["median"])
            assert row["mfu"] == pytest.approx(row["flops_per_image"] / row["median"] / result["peak"])
            assert row["peak_bytes"] > 0
            assert row["optimizer_bytes"] == 0
    assert len(record["per_pixel"]) == 3
    printed = capsys.readouterr().out
    assert "inference  float32  224x224  batch 1\n" in printed
    assert (tmp_path / "benchmark.txt").read_text().strip() in printed
    for name in ("accuracy.png", "resolution.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "no batch.png: needs two batches" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_command_times_training_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    monkeypatch.setattr(roster.Model, "create", create_small)
    models = ["--models", "*tiny", "published/spatial_mamba_tiny", "--mode", "train", "--dtype", dtype]
    assert main([*QUICK, *models, "--batch", "2", "1", "--resolution", "32", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "benchmark.json").read_text())
    two, one = record["results"]
    assert (two["images"], one["images"]) == (2, 1)
    flops = {row["model"]: row["flops_per_image"] for row in two["rows"]}
    assert flops["published/spatial_mamba_tiny"] == flops["spatial_mamba_tiny"] > 0  # the same work, done otherwise
    for row in two["rows"]:
        assert row["optimizer_bytes"] >= 1.9 * (row["weight_bytes"] - 40_000)  # the dense kernels are not learned
        assert row["peak_bytes"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["median"])
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")
    assert "no accuracy.png: needs inference at 224x224" in capsys.readouterr().out


def test_same_pixels_takes_fewer_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster.Model, "create", create_small)
    models = roster.choose(["resnet50"], peers=True)
    bench = trial.Bench(trial.Choices(CPU, models, seconds=0.001, same_pixels=True))
    [result] = bench.run("inference", "float32", 448, [8])
    assert (result["batch"], result["images"]) == (8, 2)
    assert result["rows"][0]["images_per_second"] == pytest.approx(2 / result["rows"][0]["median"])


def test_command_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roster.Model, "create", create_small)
    assert main([*QUICK, "--models", "resnet50", "--limit", "0.000001", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "out of time: inference float32 224x224 batch 8\n" in printed
    assert printed.endswith("\ncompetitors not measured: 0; cases out of time: 1\n")
    assert json.loads((tmp_path / "benchmark.json").read_text())["results"] == []


def test_command_needs_no_package_of_the_trainer() -> None:
    """GPU machines have PyTorch, timm and little else."""
    absent = "sys.modules.update(dict.fromkeys(('yacs', 'fvcore', 'mmengine', 'tensorboard', 'pynvml')))"
    module = "spatial_mamba.classification.benchmark"
    code = f"import runpy, sys; {absent}; sys.argv[1:] = ['--help']; runpy.run_module({module!r}, run_name='__main__')"
    assert "--relative-to" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_command_fails_with_a_competitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster.Model, "create", lambda *_: NotANumber())
    assert main([*QUICK, "--models", "resnet50", "--resolution", "32", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "vgg*"], "--models: 'vgg*' matches none of spatial_mamba_tiny, "),
        (["--models", "resnet50", "--no-peers"], "--models: 'resnet50' matches none of spatial_mamba_tiny, "),
        (["--models", "*base*", "--relative-to", "resnet50"], "--relative-to: 'resnet50' is none of the models that "),
        (["--form", "cudagraph"], "--form cudagraph: CUDA graphs need a GPU, but the device is cpu"),
        (["--form", "fast"], "argument --form: invalid choice: 'fast'"),
        (["--batch", "0"], "argument --batch: must be a whole number of at least 1, got '0'"),
        (["--resolution", "16"], "argument --resolution: must be at least 32 pixels, got 16"),
        (["--limit", "soon"], "argument --limit: must be a number of seconds above 0, got 'soon'"),
        (["--out", __file__], f"--out {__file__}: cannot be written: File exists"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
@pytest.mark.parametrize(("mode", "forms"), [("inference", ["eager", "fused", "cudagraph"]), ("train", ["eager"])])
def test_gpu_runs_the_forms(mode: str, forms: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster.Model, "create", create_small)
    models = roster.choose(["spatial_mamba_tiny", "published/spatial_mamba_tiny"], peers=True)
    bench = trial.Bench(trial.Choices(torch.device("cuda"), models, forms=forms, seconds=0.01))
    [result] = bench.run(mode, "bfloat16", 64, [2])
    for row in result["rows"]:
        assert "failure" not in row, row
        assert 0 < row["lower"] <= row["median"]
        assert row["joules_per_image"] is None or row["joules_per_image"] > 0
