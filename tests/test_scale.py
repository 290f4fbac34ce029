"""Budget, memory, data loading and scaling: what they count and compute, and that their commands run."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("yacs")

from spatial_mamba.classification.benchmark import budget, loading, memory, parts, scaling
from spatial_mamba.classification.benchmark.command import Table
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import build_transform
from spatial_mamba.classification.models import SpatialMamba
from spatial_mamba.classification.models.flops import count_flops
from spatial_mamba.classification.optim import build_optimizer
from spatial_mamba.classification.trainer import build_model
from spatial_mamba.kernels.benchmark import measure

CPU = torch.device("cpu")
FLOAT = 4  # bytes


def micro(**options: float) -> SpatialMamba:
    torch.manual_seed(0)
    return SpatialMamba(num_classes=10, dims=8, depths=(1, 2, 1, 1), **options)


def by_name(found: list[parts.Part]) -> dict[tuple[str, str], parts.Part]:
    return {(part.stage, part.name): part for part in found}


# --- budget -----------------------------------------------------------------------------------------------------------


def test_compulsory_bytes_by_hand() -> None:
    found = by_name(parts.parts_of(micro(), 2, 64, 32))
    tokens, dim = 2 * 8 * 4, 16  # of stage 2
    conv, linear = 9 * dim + dim, dim * 4 * dim
    position, projection = found["stage 2", "cpe1 + x"], found["stage 2", "in_proj"]
    assert (position.count, position.macs) == (2, 9 * tokens * dim)
    assert position.compulsory_bytes(torch.float32, backward=False) == FLOAT * (2 * tokens * dim + conv)
    assert projection.macs == tokens * linear
    inputs, outputs = tokens * dim, 4 * tokens * dim
    assert projection.compulsory_bytes(torch.bfloat16, backward=False) == 2 * (inputs + outputs) + FLOAT * linear
    # forward, then inputs, weights and gradient of the output read, and gradients of inputs and weights written
    assert projection.compulsory_bytes(torch.float32, backward=True) == FLOAT * (3 * inputs + 3 * linear + 2 * outputs)
    assert projection.operations(backward=True) == 3 * 2 * tokens * linear
    residual = found["stage 2", "residual sums"]
    assert (residual.count, residual.compulsory_bytes(torch.float32, backward=True)) == (4, 6 * FLOAT * inputs)
    stem = found["stem", "stem"]
    images, weights = FLOAT * 2 * 3 * 64 * 32, sum(FLOAT * p.numel() for p in micro().patch_embed.parameters())
    forward = stem.compulsory_bytes(torch.float32, backward=False)
    assert stem.compulsory_bytes(torch.float32, backward=True) == 2 * forward + weights  # images need no gradient
    assert images + weights < forward


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_multiply_adds_are_those_of_the_model(size: tuple[int, int]) -> None:
    model = SpatialMamba(num_classes=10, dims=32, depths=(1, 2, 1, 1))
    counted = count_flops(model, torch.zeros(1, 3, *size))  # with normalisation, and the scan in single operations
    assert parts.macs_per_image(model, *size) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_parts_in_a_row_are_the_model(fused: bool) -> None:
    model = micro().eval()
    if fused:
        model.fuse()
    images = torch.randn(2, 3, 40, 64)
    with torch.no_grad():
        x = images
        found = parts.parts_of(model, 2, 40, 64)
        for stage in dict.fromkeys(part.stage for part in found):
            own = {part.name: part for part in found if part.stage == stage}
            if not stage.startswith("stage"):
                x = run(own[stage], x)
                continue
            for part in own.values():
                run(part, *(torch.randn(shape) for shape in part.inputs))
            for block in model.layers[int(stage[-1]) - 1].blocks:
                x = block(x)
            if "downsample" in own:
                x = run(own["downsample"], x)
        torch.testing.assert_close(x, model(images))


def run(part: parts.Part, *inputs: torch.Tensor) -> torch.Tensor:
    assert tuple(tuple(x.shape) for x in inputs) == part.inputs
    output = part.call(*inputs)
    assert tuple(output.shape) == part.output
    return output


def test_the_parts_of_a_block_make_the_block() -> None:
    model = micro().eval()
    own = {part.name: part for part in parts.parts_of(model, 1, 32, 32) if part.stage == "stage 1"}
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        expected = model.layers[0].blocks[0](x)
        x = own["cpe1 + x"].call(x)
        branch = own["in_proj"].call(own["ln_1"].call(x))
        x = own["residual sums"].call(x, own["out_proj"].call(own["mixer"].call(branch)))
        x = own["cpe2 + x"].call(x)
        x = own["residual sums"].call(x, own["mlp"].call(own["ln_2"].call(x)))
    torch.testing.assert_close(x, expected)


def test_the_parts_of_a_fused_block_make_the_block() -> None:
    model = micro().eval()
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        expected = model.layers[0].blocks[0](x)
        own = {part.name: part for part in parts.parts_of(model.fuse(), 1, 32, 32) if part.stage == "stage 1"}
        x = own["cpe1 + x"].call(x)
        x = own["out_proj + x"].call(own["mixer"].call(own["ln_1, in_proj"].call(x)), x)
        x = own["ln_2, mlp + x"].call(own["cpe2 + x"].call(x))
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("mode", budget.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget_adds_up(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make_instruments_small(monkeypatch)
    bench = budget.Budget(micro(), CPU, dtype, mode, seconds=1e-3)
    found = bench.run(batch=2, size=32)
    assert found["whole"]["seconds"] > 0
    for stage in found["stages"]:
        assert stage["sum"]["floor"] == pytest.approx(sum(row["floor"] for row in stage["parts"]))
        for row in stage["parts"]:
            floors = {"bytes": row["bytes"] / bench.bandwidth}
            floors["operations"] = 2 * row["macs"] / bench.peak
            assert row["floor"] == pytest.approx(floors[row["set_by"]]) == pytest.approx(max(floors.values()))
            assert row["seconds"] == pytest.approx(row["count"] * row["of_one"]["seconds"])
    [whole] = [row for row in budget.table("", found).rows if row[0] == "the model as a whole"]
    assert whole[2] == f"{found['sum']['bytes'] / 1e6:.1f}"
    assert budget.blocks_line(found).count("stage") == 4


def make_instruments_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MEMORY_COPY_BYTES", 2**20)
    monkeypatch.setitem(measure.PEAK_SIZES, "cpu", 128)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "status", "key"),
    [
        (torch.OutOfMemoryError("too much"), 0, "not_run"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 0, "not_run"),
        (RuntimeError("out of order"), 1, "failure"),
    ],
    ids=["GPU", "CPU", "other"],
)
def test_only_too_little_memory_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int, key: str
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(memory, "training_step", fail)
    options = ["--variant", "tiny", "--only", "training", "--forms", "plain", "compile", "--device", "cpu"]
    assert memory.main([*options, "--out", str(tmp_path)]) == status
    assert [key in row for row in json.loads((tmp_path / "memory.json").read_text())["training"]] == [True, True]


def test_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "variant_config", micro_config)
    plain, recomputed, refused = memory.training_rows(
        "micro", ["plain", "checkpoint", "checkpoint+compile"], 2, 64, CPU, "float32", seconds=1e-3
    )
    assert recomputed["peak_bytes"] < plain["peak_bytes"]
    parameters = sum(p.numel() for p in build_model(micro_config("micro"), 10).parameters())
    assert plain["state_bytes"] == pytest.approx(3 * FLOAT * parameters, rel=0.05)  # weights and two moments
    assert "--compile with --use-checkpoint" in refused["not_run"]
    table = memory.training_table([plain, recomputed, refused], {"float32": 1e12}, "title")
    speed = plain["operations"] / plain["seconds"]
    assert table.rows[0][1] == f"{1e3 * plain['seconds']:.4g}" and table.rows[0][-1] == f"{speed / 1e12:.1%}"
    assert table.rows[2] == ("checkpoint+compile", *["-"] * 8) and refused["not_run"] in table.text()


def micro_config(variant: str, overrides: list[tuple[str, object]] = ()) -> object:
    sizes = [("MODEL.SPATIAL_MAMBA.EMBED_DIM", 16), ("MODEL.SPATIAL_MAMBA.DEPTHS", [1, 1, 1, 1])]
    return load_config("spatialmamba_digits", [*sizes, *overrides])[0]


def test_inference_memory_is_linear_in_pixels() -> None:
    model = SpatialMamba(num_classes=10, dims=16, depths=(1, 1, 1, 1)).eval().fuse()
    rows = memory.inference_rows(model, [128, 192, 256], CPU, torch.float32, seconds=1e-3)
    table, fit = memory.inference_table(rows, "title")
    assert fit["largest_deviation"] < 0.05
    assert fit["bytes_per_pixel"] == pytest.approx(rows[-1]["peak_bytes"] / 256**2, rel=0.05)
    assert [row["timed_images"] for row in rows] == [64, 28, 16]  # as many pixels each
    assert table.rows[0][-1] == "1.000"


def test_a_line_and_what_lies_off_it() -> None:
    slope, fixed, off = memory.fit_line([100, 200, 400], [1050, 2050, 4050])
    assert (slope, fixed) == (pytest.approx(10), pytest.approx(50))
    assert off == pytest.approx([0, 0, 0], abs=1e-9)
    assert max(map(abs, memory.fit_line([100, 200, 400], [1000, 4000, 16000])[2])) > 0.2


# --- data loading -----------------------------------------------------------------------------------------------------


def test_loader_processes_needed() -> None:
    rates = {1: 100.0, 2: 190.0, 4: 300.0}
    assert loading.processes_needed(rates, 150) == (2, True)
    assert loading.processes_needed(rates, 600) == (8, False)  # 75 images per second and process


def test_loading_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(loading, "MANY", 10)  # fewer than are taken: a pass ends, and another begins
    options = ["--batch-size", "4", "--seconds", "0.01", "--workers", "1", "--images-per-second", "1"]
    assert loading.main([*options, "--cfg", "spatialmamba_tiny", "--out", str(tmp_path), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "loading.json").read_text())
    assert record["data"]["images"] == 4 and record["data"]["kilobytes_per_image"] > 10
    assert all(rate > 0 for rate in record["steps"].values()) and {"read + decode", "Mixup"} <= record["steps"].keys()
    assert record["loaders"].keys() == set(loading.PIPELINES)
    printed = capsys.readouterr().out
    assert "train + Mixup: 1 loader processes keep up with 1 images/s" in printed
    assert printed.count("keep up") == len(loading.TRAINING)  # evaluation has no training to keep up with


def test_a_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loading.write_photos(tmp_path, 4)
    damaged = tmp_path / "train" / "1" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(SystemExit):
        loading.main(["--data-path", str(tmp_path), "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: {damaged}: unreadable image")


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original", "3a"])
def test_augmentation_of_any_strength_works(policy: str) -> None:
    config, _ = load_config("spatialmamba_tiny", [("AUG.AUTO_AUGMENT", policy)])
    step = next(
        step for step in build_transform(config, is_training=True).transforms if "ugment" in type(step).__name__
    )
    operations = [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]
    photo = Image.linear_gradient("L").convert("RGB")
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        assert operation(photo).size == photo.size
    for operation in operations:
        if operation.name == "PosterizeIncreasing" and operation.magnitude == 10:
            assert operation(photo).getextrema() == ((0, 0),) * 3  # it keeps no bits


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_expected_scaling_by_hand() -> None:
    links = scaling.Links(within_node=400e9, between_nodes=50e9, gpus_per_node=8)
    gradients, step, batch = 100_000_000, 0.1, 128
    one, node, two_nodes = scaling.expectation([1, 8, 16], step, batch, gradients, links)
    assert (one["bytes_sent"], one["efficiency"], one["images_per_second"]) == (0, 1, batch / step)
    assert node["bytes_sent"] == 2 * 7 / 8 * gradients and node["nodes"] == 1
    assert node["all_reduce_seconds"] == pytest.approx(node["bytes_sent"] / 400e9)
    assert two_nodes["all_reduce_seconds"] == pytest.approx(2 * 15 / 16 * gradients / 50e9) and two_nodes["nodes"] == 2
    assert two_nodes["efficiency"] == pytest.approx(0.1 / (0.1 + 0.00375))
    # behind the backward pass all but the last bucket is hidden
    visible = 0.00375 * scaling.BUCKET_BYTES / gradients
    assert two_nodes["efficiency_overlapped"] == pytest.approx(0.1 / (0.1 + visible))
    # and where communication is longer than that pass, the rest
    assert scaling.overlapped_seconds(0.3, 1.0, gradients) == pytest.approx(0.3 + 0.8)


def test_scaling_is_measured_between_processes(tmp_path: Path) -> None:
    options = ["--cfg", "spatialmamba_digits", "--processes", "1", "2", "--batch-size", "2", "--seconds", "0.01"]
    assert scaling.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scaling.json").read_text())
    alone, both = record["measured"]
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert both["step"] > 0 and both["unsynchronised"] > 0 and both["all_reduce"] > 0
    model = build_model(load_config("spatialmamba_digits")[0], 10)
    assert record["gradient_bytes"] == both["gradient_bytes"] == FLOAT * sum(p.numel() for p in model.parameters())
    assert scaling.single_step([alone, both]) == alone["step"]
    assert scaling.single_step([both]) == both["unsynchronised"]
    assert not record["expected"]  # a CPU's step tells nothing of GPUs


def test_scaling_is_computed_from_a_step(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    recipe = (Path(scaling.__file__).parents[2] / "configs/classification/spatialmamba_digits.yaml").read_text()
    config.write_text(recipe.replace("NUM_CLASSES: 10", "NUM_CLASSES: 0"))  # as many as the data set has
    options = ["--cfg", str(config), "--processes", "--step-seconds", "0.1", "--device", "cpu"]
    assert scaling.main([*options, "--out", str(tmp_path), "--markdown"]) == 0
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert record["step_seconds"] == 0.1 and len(record["expected"]) == len(scaling.GPUS)
    assert "| 64 |" in (tmp_path / "scaling.md").read_text()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_commands_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "build", lambda variant: micro())
    monkeypatch.setattr(memory, "variant_config", micro_config)
    common = ["--device", "cuda", "--seconds", "0.1", "--out", str(tmp_path)]
    model = ["--variant", "tiny", "--batch", "4", "--size", "64"]
    assert budget.main([*common, *model, "--dtype", "float32", "bfloat16", "float16"]) == 0
    results = json.loads((tmp_path / "budget.json").read_text())["results"]
    assert len(results) == 9 and all(found["whole"]["seconds"] > 0 for found in results)
    assert memory.main([*common, *model, "--forms", "plain", "checkpoint", "--sizes", "128", "256", "512"]) == 0
    record = json.loads((tmp_path / "memory.json").read_text())
    assert all(row["seconds"] > 0 for row in record["training"] + record["inference"][0]["rows"])
    assert scaling.main([*common, "--processes", "1", "--cfg", "spatialmamba_digits"]) == 0
    assert json.loads((tmp_path / "scaling.json").read_text())["measured"][0]["step"] > 0
    assert loading.main([*common, "--batch-size", "4", "--workers", "1"]) == 0


# --- commands ---------------------------------------------------------------------------------------------------------


def test_budget_and_memory_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_instruments_small(monkeypatch)
    monkeypatch.setattr(budget, "build", lambda variant: micro())
    monkeypatch.setattr(memory, "variant_config", micro_config)
    common = ["--variant", "tiny", "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path), "--size", "32"]
    assert budget.main([*common, "--batch", "2", "--mode", "inference", "--markdown"]) == 0
    assert "| the model as a whole |" in (tmp_path / "budget.md").read_text()
    assert memory.main([*common, "--batch", "2", "--sizes", "32", "64", "--forms", "plain"]) == 0
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["training"][0]["seconds"] > 0 and len(record["inference"][0]["rows"]) == 2


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (budget.main, ["--batch", "0"], "argument --batch: must be a whole number of at least 1, got '0'"),
        (budget.main, ["--size", "16"], "argument --size: must be at least 32 pixels, got 16"),
        (memory.main, ["--seconds", "soon"], "argument --seconds: must be a number of seconds above 0, got 'soon'"),
        (loading.main, ["--data-path", "nowhere"], "--data-path nowhere: no such folder"),
        (loading.main, ["--zip"], "--zip needs the folder of the archives: add --data-path FOLDER"),
        (scaling.main, ["--cfg", "nonesuch"], "nonesuch: cannot read this config file"),
        (scaling.main, ["--processes"], "--processes without numbers measures nothing: give a --step-seconds"),
        (scaling.main, ["--within-node", "-1"], "argument --within-node: must be a number above 0, got '-1'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    main: Callable, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_budget_needs_no_package_of_the_trainer() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('yacs', 'fvcore', 'mmengine', 'tensorboard')));"
        "from spatial_mamba.classification.benchmark.budget import build; print(build('tiny').num_classes)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1000\n"


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        budget.main(["--device", "cpu", "--out", str(tmp_path / "file")])
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path / 'file'}: cannot be written")


def test_tables_in_text_and_markdown() -> None:
    table = Table("title", ("name", "ms"), [("a", "1.5"), ("long", "10")], ["a note"])
    assert table.text() == "title\n  name   ms\n  a     1.5\n  long   10\n  a note"
    assert table.markdown() == "title\n\n| name | ms |\n| --- | ---: |\n| a | 1.5 |\n| long | 10 |\n\na note"


# --- optimiser --------------------------------------------------------------------------------------------------------


def test_the_fused_optimiser_updates_as_the_plain_one_does() -> None:
    config, _ = load_config("spatialmamba_digits")
    torch.manual_seed(0)
    models = [build_model(config, 10) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(config, model, world_size=1) for model in models]
    assert all(group["fused"] for group in optimizers[0].param_groups)
    for group in optimizers[1].param_groups:
        group["fused"], group["foreach"] = False, False
    images = torch.randn(2, 3, 32, 32)
    models[0](images).square().sum().backward()  # gradients as the model lays them out
    for _ in range(3):
        for p, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    groups = optimizers[0].state_dict()["param_groups"]
    optimizers[0].load_state_dict({"state": optimizers[1].state_dict()["state"], "param_groups": groups})  # as resumed
    for optimizer in optimizers:
        optimizer.step()
    for (name, p), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_other_optimisers_are_built_as_they_can_be(name: str) -> None:
    config, _ = load_config("spatialmamba_digits", [("TRAIN.OPTIMIZER.NAME", name)])
    model = build_model(config, 10)
    optimizer = build_optimizer(config, model, world_size=1)
    assert optimizer.param_groups[0].get("fused", False) is (name == "sgd")
