"""The benchmark of models: which models run, what is measured, parts, processes and data loading."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.benchmark import parts, prepared, roster
from spatial_mamba.classification.benchmark.__main__ import main
from spatial_mamba.classification.benchmark.baseline import as_baseline
from spatial_mamba.classification.benchmark.prepared import LAYOUTS, Case, form_of, make_call
from spatial_mamba.kernels.benchmark import measure

from .micro_models import filled_classifier

pytestmark = pytest.mark.usefixtures("small_instruments")
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--seconds", "0.001"]
FLOAT = 4  # bytes
small_model = partial(filled_classifier, dims=16, depths=(1, 2))


class SmallPeer(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(model: roster.Model, resolution: int) -> nn.Module:
        module = SmallPeer() if model.is_peer else SpatialMamba(dims=16, depths=(1, 1))
        return as_baseline(module) if model.family == roster.BASELINE else module

    monkeypatch.setattr(roster.Model, "create", create)


def record(folder: Path, name: str, *options: str) -> dict[str, Any]:
    assert main([*QUICK, *options, "--out", str(folder)]) == 0
    return json.loads((folder / f"{name}.json").read_text())


def test_baseline_computes_the_same() -> None:
    images, labels = torch.randn(3, 3, 64, 48), torch.tensor([0, 3, 1])
    ours, baseline = small_model(), as_baseline(small_model())
    assert "dense" not in "".join(baseline.state_dict())
    torch.testing.assert_close(baseline.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-5)
    gradients = []
    for model in (ours, baseline):
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    for (name, _), expected, found in zip(ours.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_baseline_drops_paths() -> None:
    block, tokens = as_baseline(small_model(drop_path_rate=0.9)).train().layers[1].blocks[1], torch.ones(64, 4, 4, 32)
    outputs = block(tokens).flatten(1).detach()
    assert len(torch.unique(outputs.round(decimals=3), dim=0)) > 1  # equal samples give different outputs


def test_models_are_chosen_by_name_and_pattern() -> None:
    names = [model.name for model in roster.choose(["swin_tiny*", "spatial_mamba_b*", "*tiny*"])]
    assert names[:3] == ["swin_tiny_patch4_window7_224", "spatial_mamba_base", "spatial_mamba_tiny"]
    assert names[3:] == ["convnext_tiny", "mambaout_tiny", "baseline/spatial_mamba_tiny"]
    assert all(timm.is_model(name.removeprefix("baseline/")) for name in roster.MODELS)
    with torch.device("meta"):  # Swin is made for the size
        assert roster.choose(["swin_tiny*"])[0].create(256).patch_embed.img_size == (256, 256)


def test_forms_that_a_model_lacks_are_run_without_them() -> None:
    ours, peer, baseline = roster.choose(["spatial_mamba_tiny", "resnet50", "baseline/*tiny"])
    forms = ("eager", "fused", "fused+compile", "checkpoint", "onnx", "aoti")

    def run(model: roster.Model, mode: str) -> list[str]:
        return [form_of(model, form, mode) for form in forms]

    assert run(ours, "inference") == ["eager", "fused", "fused+compile", "eager", "onnx", "aoti"]
    assert run(peer, "inference") == ["eager", "eager", "compile", "eager", "eager", "eager"]
    assert run(ours, "train") == run(peer, "train") == ["eager", "eager", "compile", "checkpoint", "eager", "eager"]
    assert run(baseline, "inference") == run(baseline, "train") == ["eager"] * 6


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_flops_count_a_multiply_add_as_two(fused: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model("spatial_mamba_tiny")
    model = model.to_empty(device="cpu").eval()
    if fused:
        model.fuse()
    # 4.5 GFLOPs as published, a multiply-add counted as one; element-wise operations are not counted here
    assert measure.dry_run(model, torch.empty(1, 3, 224, 224))[1] == pytest.approx(2 * 4.5e9, rel=0.03)


def run_one(monkeypatch: pytest.MonkeyPatch, create: Callable) -> dict[str, Any]:
    """The row of the model that replaces ResNet-50."""
    monkeypatch.setattr(roster.Model, "create", lambda model, size: create())
    case, trial = Case("inference", "float32", 32, 3), measure.Trial(CPU, measure.wall_clock(CPU), 1e-9)
    [model] = roster.choose(["resnet50"])
    return trial.run([(model.name, partial(make_call, model, "eager", case, CPU))])[0]


def test_a_peer_that_cannot_take_the_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> nn.Module:
        raise AssertionError("no")

    assert run_one(monkeypatch, create)["not_run"] == "cannot take 32x32 images: no"
    monkeypatch.setattr(prepared, "BASE_RESOLUTION", 32)  # which all can take
    assert run_one(monkeypatch, create)["failure"] == "AssertionError: no"


def test_the_fastest_setting_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {("channels-last", "plain attention"): 3, ("channels-last", "fused attention"): 2}
    times |= {("contiguous", "plain attention"): 3, ("contiguous", "fused attention"): 1}
    with monkeypatch.context() as timed:
        timed.setattr(SmallPeer, "fused_attn", False, raising=False)
        timed.setattr(prepared.Prepared, "_seconds", lambda model, apply, setting: times[setting])
        assert run_one(monkeypatch, SmallPeer)["note"] == "contiguous, fused attention"
    assert run_one(monkeypatch, SmallPeer)["note"] in LAYOUTS  # timed


def test_command_reports(tmp_path: Path, small_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--models", "resnet50", "spatial_mamba_tiny", "--form", "eager", "fused"]
    found = record(tmp_path, "models", *options, "--batch", "1", "--resolution", "64", "224")
    assert found["environment"]["timm"] == timm.__version__
    assert "--models resnet50 spatial_mamba_tiny" in found["command"]
    assert [result["resolution"] for result in found["results"]] == [64, 224]
    for result in found["results"]:
        names = ["resnet50, eager", "spatial_mamba_tiny, eager", "spatial_mamba_tiny, fused"]
        assert [row["name"] for row in result["rows"]] == names
        for row in result["rows"]:
            assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
            assert row["times_first"] == pytest.approx(row["seconds"] / result["rows"][0]["seconds"])
            assert row["peak_bytes"] > 0 and row["weight_bytes"] > 0
    printed = capsys.readouterr().out
    assert "inference, float32, 224x224, batch 1" in printed
    for name in ("accuracy.png", "resolution.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_command_times_training_steps(tmp_path: Path, small_models: None, dtype: str) -> None:
    options = ["--models", "*tiny", "baseline/*tiny", "--mode", "train", "--dtype", dtype, "--resolution", "32"]
    [result] = record(tmp_path, "models", *options, "--batch", "2")["results"]
    assert len(result["rows"]) == 4
    assert all(row["peak_bytes"] > 0 and row["images_per_second"] > 0 for row in result["rows"])


@pytest.mark.slow
def test_exported_files_and_checkpointing_are_timed(tmp_path: Path, small_models: None) -> None:
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    model = ["--models", "spatial_mamba_tiny", "--batch", "2"]
    [result] = record(tmp_path, "models", *model, "--form", "eager", "onnx", "--resolution", "32")["results"]
    assert [(row["form"], row["peak_bytes"] is None) for row in result["rows"]] == [("eager", False), ("onnx", True)]
    training = [*model, "--mode", "train", "--form", "eager", "checkpoint", "--resolution", "64"]
    [result] = record(tmp_path, "models", *training)["results"]
    assert result["rows"][1]["peak_bytes"] < result["rows"][0]["peak_bytes"]


def test_same_pixels_and_limit(tmp_path: Path, small_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--models", "resnet50", "--resolution", "448", "--batch", "8", "--same-pixels"]
    assert record(tmp_path, "models", *options)["results"][0]["images"] == 2
    found = record(tmp_path, "models", "--models", "resnet50", "--limit", "0.000001")
    assert found["results"] == [] and found["skipped"] == ["inference, float32, 224x224, batch 8"]
    assert capsys.readouterr().out.endswith("; failed: 0; not run: 1\n")


@pytest.mark.slow
def test_command_needs_no_package_of_the_trainer() -> None:
    """GPU machines may have only PyTorch, timm and little else."""
    absent = "sys.modules.update(dict.fromkeys(('yacs', 'fvcore', 'mmengine', 'tensorboard', 'onnx')))"
    module = "spatial_mamba.classification.benchmark"
    code = f"import runpy, sys; {absent}; sys.argv[1:] = ['--help']; runpy.run_module({module!r}, run_name='__main__')"
    assert "--same-pixels" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def bench(mode: str = "inference", fused: bool = False) -> parts.Bench:
    trial = measure.Trial(CPU, measure.wall_clock(CPU), 1e-9)
    found = parts.Bench(small_model(), Case(mode, "float32", 64, 2), trial, fused)
    found.add_all()
    return found


def test_compulsory_bytes_by_hand() -> None:
    rows, training = ({row["name"]: row for row in bench(mode).rows} for mode in ("inference", "train"))
    tokens, dim, depth = 2 * 8 * 8, 32, 2  # of stage 2
    inputs, outputs, weights = FLOAT * tokens * dim, 4 * FLOAT * tokens * dim, FLOAT * dim * 4 * dim
    projection = rows["stage 2: in_proj"]
    assert (projection["bytes"], projection["count"]) == (depth * (inputs + outputs + weights), depth)
    assert projection["flops"] == depth * 2 * tokens * dim * 4 * dim
    # forward, then inputs, weights and gradient of the output read, and gradients of inputs and weights written
    assert training["stage 2: in_proj"]["bytes"] == depth * (3 * inputs + 3 * weights + 2 * outputs)
    assert training["stage 2: in_proj"]["flops"] == 3 * projection["flops"]
    assert training["stage 2: residual sums"]["bytes"] == 2 * rows["stage 2: residual sums"]["bytes"]
    assert rows["stage 2: residual sums"]["bytes"] == depth * 2 * 3 * inputs
    gradients = sum(FLOAT * p.numel() for p in small_model().patch_embed.parameters())
    assert training["stem"]["bytes"] == 2 * rows["stem"]["bytes"] + gradients  # images need no gradient


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_operations_of_the_parts_are_those_of_the_model(fused: bool) -> None:
    found = bench(fused=fused)
    counted = sum(row["flops"] for row in found.rows)
    assert counted == measure.dry_run(found.model, torch.empty(2, 3, 64, 64))[1]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_parts_of_a_block_make_the_block(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    added: dict[str, Callable] = {}
    monkeypatch.setattr(parts.Bench, "add", lambda _, name, count, function, *x, **more: added.update({name: function}))
    found, x = bench(fused=fused), torch.randn(2, 16, 16, 16)
    own = {name.removeprefix("stage 1: "): function for name, function in added.items()}
    with torch.no_grad():
        expected = found.model.layers[0].blocks[0](x)
        x = own["cpe1 + x"](x)
        if fused:
            x = own["cpe2 + x"](own["out_proj + x"](own["mixer"](own["ln_1, in_proj"](x)), x))
            x = own["ln_2, mlp + x"](x)
        else:
            branch = own["out_proj"](own["mixer"](own["in_proj"](own["ln_1"](x))))
            x = own["cpe2 + x"](own["residual sums"](x, branch))
            x = own["residual sums"](x, own["mlp"](own["ln_2"](x)))
    torch.testing.assert_close(x, expected)


def test_parts_add_up(tmp_path: Path, small_models: None) -> None:
    options = ["--models", "*tiny*", "--parts", "--mode", "inference", "train", "--form", "fused"]
    results = record(tmp_path, "parts", *options, "--dtype", "bfloat16", "--batch", "2", "--resolution", "64")
    for result, form in zip(results["results"], ("fused", "eager"), strict=True):
        *rows, total, whole = result["rows"]
        assert result["form"] == form and whole["name"] == parts.WHOLE and whole["seconds"] > 0
        assert total["bound"] == whole["bound"] == pytest.approx(sum(row["bound"] for row in rows))
        for row in rows:
            bounds = {"bytes": row["bytes"] / result["bandwidth"], "operations": row["flops"] / result["peak"]}
            assert row["bound"] == pytest.approx(bounds[row["set_by"]]) == pytest.approx(max(bounds.values()))


@pytest.mark.slow
def test_steps_are_timed_between_processes(tmp_path: Path) -> None:
    options = ["--models", "spatial_mamba_tiny", "--processes", "1", "2", "--batch", "2", "--resolution", "32"]
    [result] = record(tmp_path, "processes", *options)["results"]
    alone, both = result["rows"]
    assert (alone["processes"], both["processes"], alone["efficiency"]) == (1, 2, 1)
    assert both["efficiency"] == pytest.approx(alone["seconds"] / both["seconds"])
    assert both["visible"] == pytest.approx(both["seconds"] - both["unsynchronised"]) and both["all_reduce"] > 0


def test_loading_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("yacs")
    from spatial_mamba.classification.benchmark import loading

    monkeypatch.setattr(loading, "MANY", 10)  # fewer than are taken, so that one pass ends and another begins
    common = ["--batch-size", "4", "--seconds", "0.01", "--workers", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert loading.main(common) == 0
    [result] = json.loads((tmp_path / "loading.json").read_text())["results"]
    rates = {row["name"]: row["images_per_second"] for row in result["rows"] if "workers" not in row}
    assert {"read + decode", "Mixup"} <= rates.keys() and min(rates.values()) > 0
    loaders = {row["name"]: row["images_per_second"] for row in result["rows"] if row.get("workers") == 1}
    assert tuple(loaders) == loading.PIPELINES and min(loaders.values()) > 0
    capsys.readouterr()

    loading.write_photos(tmp_path, 4)
    damaged = tmp_path / "train" / "1" / "3.jpg"
    assert 100_000 < damaged.stat().st_size < 120_000
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert loading.main([*common, "--data-path", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {damaged}: unreadable image")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
@pytest.mark.parametrize(("mode", "forms"), [("inference", ["eager", "fused", "cudagraph"]), ("train", ["eager"])])
def test_gpu_runs_the_forms(mode: str, forms: list[str], tmp_path: Path, small_models: None) -> None:
    common = ["--device", "cuda", "--seconds", "0.1", "--models", "spatial_mamba_tiny", "baseline/*tiny"]
    common += ["--mode", mode, "--dtype", "bfloat16", "--batch", "2", "--resolution", "64", "--out", str(tmp_path)]
    assert main([*common, "--form", *forms]) == main([*common, "--parts"]) == main([*common, "--processes", "1"]) == 0
    assert all(row["seconds"] > 0 for row in json.loads((tmp_path / "models.json").read_text())["results"][0]["rows"])
