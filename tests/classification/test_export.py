"""Exported files: same results as the model, no loops, small; errors of the command."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.export import check, command, export_aoti, export_onnx, export_program, onnx_file
from spatial_mamba.classification.export.check import fixed_images, largest_difference
from spatial_mamba.classification.export.form import export_form, softplus
from spatial_mamba.classification.export.onnx_file import onnx_facts, onnx_function
from spatial_mamba.kernels import use_backend
from spatial_mamba.kernels.errors import UserError
from spatial_mamba.kernels.recurrence import LARGEST_BLOCK, _block_sizes, linear_recurrence, scan_in_blocks

from .micro_models import FUSIONS, filled_classifier, golden_fill, micro_backbone, with_statistics

ODD, WIDE = (33, 47), (64, 96)
LOOPS = {"Loop", "Scan", "If", "ScatterND", "ScatterElements", "SequenceAt", "SplitToSequence"}
CHECKPOINT_SIZE = 64
Capture = pytest.CaptureFixture[str]
needs_exporter = pytest.mark.skipif(torch.__version__ < onnx_file.OLDEST_PYTORCH, reason="PyTorch is too old")


def micro(**changes: Any) -> SpatialMamba:
    return with_statistics(filled_classifier(**dict(depths=(1, 1)) | changes))


def with_extreme_steps(model: SpatialMamba) -> SpatialMamba:
    """Let every third channel keep everything and every third forget everything (decays underflow)."""
    for stage in model.layers:
        for block in stage.blocks:
            ssm = block.self_attention
            with torch.no_grad():
                ssm.dt_projs_bias[0::3], ssm.dt_projs_bias[1::3] = -60.0, 200.0
                ssm.A_logs[1::3] = 3.0
    return model


def checkpoint(folder: Path, **more: Any) -> Path:
    path = folder / "micro.pth"
    config = {"DATA": {"IMG_SIZE": CHECKPOINT_SIZE, "INTERPOLATION": "bilinear"}, "TEST": {"CROP": False}}
    torch.save({"model": micro(depths=(1,)).state_dict(), "classes": list("abcde"), "config": config} | more, path)
    return path


def status(*argv: object) -> int:
    return command.main([str(argument) for argument in argv])


# --- the scan


def recurrence(decays: Tensor, inputs: Tensor) -> Tensor:
    """The operator, along the tokens of (batch, L, dim)."""
    return linear_recurrence(decays[:, 1:].mT.contiguous(), inputs.mT.contiguous()).mT


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 13, 49, 64, 108, 509, 3136])
def test_scan_in_blocks_is_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    decays = torch.rand(2, length, 3, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(scan_in_blocks(decays, inputs), recurrence(decays, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1e-45, 1e-30, 1.0])
def test_extreme_decays(decay: float) -> None:
    decays, inputs = torch.full((1, 1000, 2), decay), torch.ones(1, 1000, 2)
    inputs[:, 500:] = 0
    torch.testing.assert_close(scan_in_blocks(decays, inputs), recurrence(decays, inputs), rtol=1e-6, atol=0)


def test_blocks_hold_the_tokens_and_hardly_more() -> None:
    for length in range(1, 5000):
        sizes = _block_sizes(length)
        assert length <= math.prod(sizes) <= 1.1 * length and max(sizes) <= LARGEST_BLOCK
    assert _block_sizes(56 * 56) == (8, 8, 7, 7)


def test_softplus_is_relatively_exact() -> None:
    x = torch.cat([torch.linspace(-80, 80, 100_001), torch.tensor([-1e4, 0.0, 1e4])])
    torch.testing.assert_close(softplus(x).double(), F.softplus(x.double(), threshold=100), rtol=5e-7, atol=1e-40)


# --- the form


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size", [ODD, WIDE])
def test_form_matches_the_model(fusion: str, size: tuple[int, int]) -> None:
    model = micro(depths=(1, 2, 1, 1), **FUSIONS[fusion])
    images = fixed_images(model, size, 3)
    with torch.no_grad(), use_backend("torch"):
        expected = model(images)
    torch.testing.assert_close(export_form(model)(images), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_form_leaves_the_model_as_it_is() -> None:
    model = micro()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    export_form(model)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_be_exported() -> None:
    with pytest.raises(RuntimeError, match="a fused model cannot be exported: export the model as it was before"):
        export_form(micro().fuse())
    with pytest.raises(RuntimeError, match="evaluation mode can be exported: call eval"):
        export_form(micro().train())
    with pytest.raises(UserError, match="image size of 31x64 is too small; height and width must be at least 32"):
        export_program(micro(), (31, 64))


# --- torch.export and AOTInductor


def test_program_takes_any_batch_and_holds_no_operator_of_this_package() -> None:
    model = micro()
    program = export_program(model, ODD)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators and not any("spatial_mamba" in name or "autocast" in name for name in operators)
    function = program.module()
    for batch in (1, 2, 5):
        images = fixed_images(model, ODD, batch)
        torch.testing.assert_close(function(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_aotinductor_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro(dims=4, depths=(1,))
    path = tmp_path / "model.pt2"
    # No precompiled headers, optimisation or vector instructions: they take longer than the code of a small model.
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list)
    quick = {"precompile_headers": False, "compile_wrapper_opt_level": "O0"}
    known = torch._inductor.config.aot_inductor  # PyTorch 2.7 has neither of them
    options = {f"aot_inductor.{name}": value for name, value in quick.items() if hasattr(known, name)}
    with torch._inductor.config.patch(options):
        export_aoti(model, path, 32, {"variant": "custom"})
    package = torch._inductor.aoti_load_package(str(path))
    assert largest_difference(package, model, 32) < 1e-5
    assert package.get_metadata()["variant"] == "custom"


# --- ONNX


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "micro.onnx"
    export_onnx(with_extreme_steps(micro(depths=(1,))), path, WIDE, {"note": "kept"})
    return path


@pytest.mark.slow
@needs_exporter
@pytest.mark.xdist_group("onnx")
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_onnx_runtime_gives_the_logits_of_the_model(batch: int, onnx_path: Path) -> None:
    model = with_extreme_steps(micro(depths=(1,)))
    images = fixed_images(model, WIDE, batch)
    (logits,) = onnx_function(onnx_path)(images)
    with torch.no_grad():
        expected = model(images)
    assert logits.shape == (batch, 5)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@needs_exporter
@pytest.mark.xdist_group("onnx")
def test_graph_is_flat_small_and_without_traces_of_the_machine(onnx_path: Path) -> None:
    proto = onnx.load(onnx_path)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    facts = onnx_facts(onnx_path)
    assert facts.opset == onnx_file.OPSET
    assert not LOOPS & facts.operators.keys()
    assert {entry.domain for entry in proto.opset_import} <= {"", "ai.onnx"}
    weights = sum(parameter.numel() * 4 for parameter in micro(depths=(1,)).parameters())
    assert onnx_path.stat().st_size < weights + 250 * facts.nodes
    assert b"site-packages" not in onnx_path.read_bytes()
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"note": "kept"}


@pytest.mark.slow
@needs_exporter
@pytest.mark.xdist_group("onnx")
def test_number_of_nodes_grows_with_the_logarithm_of_the_tokens(onnx_path: Path, tmp_path: Path) -> None:
    large = (512, 768)
    export_onnx(micro(depths=(1,)), tmp_path / "model.onnx", large)
    levels = math.log(math.prod(large) / math.prod(WIDE), LARGEST_BLOCK)  # 64 times as many tokens
    assert onnx_facts(tmp_path / "model.onnx").nodes - onnx_facts(onnx_path).nodes <= levels * 6 * LARGEST_BLOCK


@pytest.mark.slow
@needs_exporter
def test_onnx_of_an_ablated_backbone_of_odd_size(tmp_path: Path) -> None:
    backbone = micro_backbone(depths=(1, 1), out_indices=(0, 1), **FUSIONS["two kernels"])
    model = with_statistics(golden_fill.fill_(backbone))
    export_onnx(model, tmp_path / "model.onnx", ODD)
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == ["feature0", "feature1"]
    assert largest_difference(onnx_function(tmp_path / "model.onnx"), model, ODD) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # both exporters warn about their own deprecated parts
@pytest.mark.parametrize(
    "dynamo",
    [False, pytest.param(True, marks=pytest.mark.skipif(torch.__version__ < "2.8", reason="needs PyTorch 2.8"))],
)
def test_onnx_export_of_pytorch(dynamo: bool, tmp_path: Path) -> None:
    """``torch.onnx.export`` works on the model itself, for users who do not know the export command."""
    model = with_extreme_steps(micro(depths=(1,)))
    axes = (
        dict(dynamic_shapes=({0: torch.export.Dim("batch")},))
        if dynamo
        else dict(dynamic_axes={"images": {0: "batch"}})
    )
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (fixed_images(model, ODD, 2),), path, dynamo=dynamo, input_names=["images"], **axes)
    images = fixed_images(model, ODD, 3)
    with torch.no_grad():
        torch.testing.assert_close(onnx_function(path)(images)[0], model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_exporter
def test_int8(tmp_path: Path) -> None:
    model = micro(dims=32)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, ODD, {"note": "kept"}, int8=True)
    operators = onnx_facts(path).operators
    assert operators["MatMulInteger"] > 0 and not LOOPS & operators.keys()
    assert path.stat().st_size < 0.8 * sum(parameter.numel() * 4 for parameter in model.parameters())
    assert 1e-6 < largest_difference(onnx_function(path), model, ODD) < 0.1
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props} == {"note": "kept"}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_dynamic_quantisation_of_pytorch() -> None:
    model = micro()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    assert 1e-6 < largest_difference(quantised, model, WIDE) < 0.1


# --- the command


@pytest.mark.slow
@needs_exporter
def test_command_writes_a_checked_and_described_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status("--checkpoint", checkpoint(tmp_path)) == 0
    path = tmp_path / "micro.onnx"
    printed = capsys.readouterr().out
    facts = onnx_facts(path)
    assert f"micro.onnx: ONNX, opset {facts.opset}, {facts.nodes} nodes; images (batch, 3, 64, 64)" in printed
    assert "largest difference from the model" in printed
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert metadata == {
        "variant": "custom",
        "image_size": [64, 64],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop": False,
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "class_names": list("abcde"),
    }
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["micro.onnx", "micro.pth"]


def test_command_writes_a_program(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "other.pt2"
    assert status("--checkpoint", checkpoint(tmp_path), "--size", 33, 47, "--output", path) == 0
    assert "other.pt2: program of torch.export; images (batch, 3, 33, 47)" in capsys.readouterr().out
    facts = {"class_names": "", "image_size": ""}
    program = torch.export.load(path, extra_files=facts)
    assert largest_difference(program.module(), micro(depths=(1,)), ODD) < 1e-5
    assert json.loads(facts["class_names"]) == list("abcde") and json.loads(facts["image_size"]) == [33, 47]


def test_a_wrong_file_is_not_kept(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "micro.pt2"
    path.write_bytes(b"an earlier file")
    monkeypatch.setattr(check, "fixed_images", lambda model, size, batch: torch.full((batch, 3, *size), math.nan))
    assert status("--checkpoint", checkpoint(tmp_path), "--output", path) == 2
    assert "micro.pt2: not written, since its logits differ from the model's by nan" in capsys.readouterr().err
    assert path.read_bytes() == b"an earlier file"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["micro.pt2", "micro.pth"]


@needs_exporter
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "31"], "31x31 is too small; height and width must be at least 32 pixels"),
        (["--size", "64", "64", "64"], "--size 64 64 64: give one number, or height and width"),
        (["--output", "model.bin"], "--output model.bin: must end in .onnx or .pt2, or give a --format"),
        (["--output", "a.onnx", "--format", "aoti"], "--output a.onnx: a file of the format aoti must end in .pt2"),
        (["--output", "a.pt2", "--int8"], "--int8: only ONNX files are quantised, not the format torch"),
        (["--format", "aoti", "--int8"], "--int8: only ONNX files are quantised, not the format aoti"),
        (["--device", "cuda"], "--device cuda: a file of the format onnx runs on any device; omit the option"),
        (["--output", "folder.onnx"], "--output folder.onnx: is a folder; name the file to write"),
        (["--output", "none/a.onnx"], "--output none/a.onnx: there is no folder none; create it first"),
        (["--ema"], "holds no EMA weights; use those of the model, without --ema"),
        (["--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
    ],
)
def test_wrong_options_are_one_line(
    options: Sequence[str], message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    assert status("--checkpoint", checkpoint(tmp_path), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.onnx", "micro.pth"]


@needs_exporter
def test_a_folder_that_cannot_be_written_is_named_before_exporting(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path)
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK))  # root may write
    assert status("--checkpoint", path, "--output", str(tmp_path / "a.onnx")) == 2
    error = capsys.readouterr().err
    assert error == f"error: --output {tmp_path}/a.onnx: the folder {tmp_path} is not writable\n"


def test_what_is_missing_is_named(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "no_such_package"))
    found = "ONNX files need more packages: pip install no_such_package"
    too_old = f"ONNX files need PyTorch 99 or newer, but this is {torch.__version__}"
    for oldest, message in (("2", found), ("99", too_old)):
        monkeypatch.setattr(onnx_file, "OLDEST_PYTORCH", oldest)
        assert status("--checkpoint", checkpoint(tmp_path)) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
