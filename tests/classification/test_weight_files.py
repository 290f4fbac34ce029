"""Checkpoint files: inspection, conversion, verification, folders of the Hub, classification of images."""

import argparse
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath, WindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import parse
from PIL import Image
from timm.models import adapt_input_conv
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from yacs.config import CfgNode

from spatial_mamba import SpatialMamba, SpatialMambaBackbone
from spatial_mamba.classification import prediction
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.export import command as export_command
from spatial_mamba.classification.models import WeightsError
from spatial_mamba.classification.models.architecture import architecture_of
from spatial_mamba.classification.models.trained import load_classifier
from spatial_mamba.classification.models.weights import load_strictly, read_checkpoint, state_dict_of
from spatial_mamba.classification.visualize import command as visualize_command
from spatial_mamba.classification.weight_files import command
from spatial_mamba.classification.weight_files.verification import fixed_image, weights_digest

from . import micro_models
from .micro_models import PARAMETERS, LeavesATrace, micro_backbone, micro_classifier

MICRO = micro_models.MICRO | dict(num_classes=5)
Capture = pytest.CaptureFixture[str]


def classifier(seed: int = 0, **changes: Any) -> SpatialMamba:
    """A small classifier, none of whose parameters has its initial value."""
    model = micro_classifier(**changes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def published(model: SpatialMamba, ema: SpatialMamba) -> dict[str, Any]:
    """A training checkpoint in the published layout."""
    config = CfgNode({"MODEL": {"TYPE": "spatial_mamba"}, "DATA": {"IMG_SIZE": 48}, "TEST": {"CROP": False}})
    return dict(
        model=model.state_dict(),
        model_ema=ema.state_dict(),
        optimizer=create_optimizer_v2(model, opt="adamw", weight_decay=0.05).state_dict(),
        lr_scheduler={"base": 1.0},
        scaler={},
        epoch=299,
        max_accuracy=83.4,
        max_accuray_ema=83.5,
        steps=375_000,
        config=config,
    )


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def detector(state: dict[str, Tensor]) -> dict[str, Any]:
    """A detector's checkpoint as mmengine writes it, with NumPy numbers and arrays."""
    weights = prefixed("backbone.", state) | {"bbox_head.weight": torch.ones(3)}
    log = {"scalar": np.float64(0.5), "array": np.arange(3.0)}
    return {"meta": {"epoch": 12}, "state_dict": weights, "message_hub": log}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    model, ema = classifier(0), classifier(1)
    torch.save(published(model, ema), folder / "published.pth")
    torch.save({"model": model.state_dict(), "classes": list("abcde")}, folder / "ours.pth")
    torch.save(model.state_dict(), folder / "bare.pth")
    torch.save(detector(micro_backbone(out_indices=(1, 3)).state_dict()), folder / "detector.pth")
    return folder


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def inspect(path: Path, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert run("inspect", path, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- inspection


@pytest.mark.parametrize(
    ("options", "fusion"),
    [
        ({}, ((1, 3, 5), (3, 3, 3))),
        ({"fusion_dilations": ()}, ((), ())),
        ({"fusion_dilations": (11, 2, 3), "fusion_kernel_sizes": (3, 5, 1)}, ((2, 3, 11), (5, 1, 3))),
        ({"fusion_dilations": (1, 1), "fusion_kernel_sizes": (5, 3)}, ((1, 1), (3, 5))),
        ({"mlp_ratio": 3.3, "dims": 64, "depths": (1, 1, 1)}, ((1, 3, 5), (3, 3, 3))),
        ({"mlp_ratio": 8 / 3}, ((1, 3, 5), (3, 3, 3))),
        ({"mlp_ratio": 2.0, "in_chans": 1, "num_classes": 0, "depths": (1, 2)}, ((1, 3, 5), (3, 3, 3))),
    ],
)
def test_the_architecture_is_inferred_from_the_weights(options: dict[str, Any], fusion: tuple[Any, Any]) -> None:
    model = classifier(**options)
    state = dict(sorted(model.state_dict().items()))  # as safetensors orders them
    architecture = architecture_of(state)
    assert (architecture.fusion_dilations, architecture.fusion_kernel_sizes) == fusion
    again = SpatialMamba(**architecture.options()).eval()
    again.load_state_dict(state, strict=True)
    x = torch.randn(1, model.in_chans, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_inconsistent_weights_take_no_memory(tmp_path: Path) -> None:
    state = classifier().state_dict()
    kernel = "layers.0.blocks.0.self_attention.state_fusion.kernel_99999_dilation_1"
    for forged, message in (
        ({"layers.0.blocks.999999999.ln_1.weight": torch.ones(8)}, "holds no Spatial-Mamba classifier"),
        ({kernel: torch.ones(16, 1, 3, 3)}, "holds no Spatial-Mamba classifier"),
        ({"head.weight": torch.tensor(1.0)}, "holds no Spatial-Mamba classifier"),
        ({"layers.0.blocks.0.ln_1.weight": torch.ones(10**6)}, "does not fit this model"),
        ({"layers.0.blocks.0.ln_1.weight": torch.ones(7)}, "holds weights of an impossible model: dims"),
    ):
        torch.save(state | forged, tmp_path / "forged.pth")
        with pytest.raises(WeightsError, match=rf"forged\.pth: {message}"):
            load_classifier(tmp_path / "forged.pth")
    del state["layers.0.blocks.0.ln_1.bias"]
    for incomplete in (state, {"model": state, "epoch": 3}):
        with pytest.raises(RuntimeError, match=r'Missing key.*"layers\.0\.blocks\.0\.ln_1\.bias"'):
            classifier().load_state_dict(incomplete)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"DATA": {"IMG_SIZE": [224, 224]}}, r"DATA\.IMG_SIZE is \[224, 224\], not a size of 32 to"),
        ({"DATA": {"IMG_SIZE": 0}}, r"DATA\.IMG_SIZE is 0"),
        ({"TEST": {"CROP": "False"}}, r"TEST\.CROP is 'False'"),
        ({"DATA": {"INTERPOLATION": "cubic"}}, r"DATA\.INTERPOLATION is 'cubic', not one of bicubic"),
    ],
)
def test_a_meaningless_config_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    torch.save({"model": classifier().state_dict(), "config": config}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=rf"model\.pth: config key {message}"):
        load_classifier(tmp_path / "model.pth")


@pytest.mark.parametrize("others", [[], [np.dtype, np.float64(0).__reduce__()[0]]], ids=["none", "NumPy's own"])
def test_reading_ignores_and_keeps_the_safe_globals_of_the_process(tmp_path: Path, others: list[Any]) -> None:
    content = {"model": classifier().state_dict(), "max_accuracy": np.float64(83.4), "history": np.arange(3.0)}
    torch.save(content, tmp_path / "model.pth")
    with torch.serialization.safe_globals(others):
        before = torch.serialization.get_safe_globals()
        assert read_checkpoint(tmp_path / "model.pth")["max_accuracy"] == 83.4
        assert set(map(id, torch.serialization.get_safe_globals())) == set(map(id, before))


@pytest.mark.slow
def test_a_model_of_timms_leaves_other_files_readable(tmp_path: Path) -> None:
    torch.save(np.arange(3.0), tmp_path / "array.pth")
    script = """if True:
        import numpy as np, timm, torch, spatial_mamba
        timm.create_model("spatial_mamba_tiny", device="meta")
        allowed = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(allowed):
            print(type(torch.load("array.pth", weights_only=True)).__name__)
    """
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "ndarray\n"


def test_the_published_variants_are_known_by_their_weights() -> None:
    with torch.device("meta"):
        for variant in PARAMETERS:
            assert architecture_of(timm.create_model(f"spatial_mamba_{variant}").state_dict()).variant == variant
    assert architecture_of(classifier().state_dict()).variant == "custom"
    assert architecture_of({"layers.0.weight": torch.ones(1)}) is None


def test_inspection_reports_the_contents_of_a_file(files: Path, capsys: Capture) -> None:
    found = inspect(files / "published.pth", capsys)
    assert found["layout"] == "published"
    assert found["holds"] == "classifier"
    assert found["parameters"] == sum(p.numel() for p in classifier().parameters())
    assert found["epoch"] == 299 and found["max_accuray_ema"] == 83.5
    assert found["ema"].startswith("yes, ")
    assert found["training state"] == ["optimizer", "lr_scheduler"]
    assert found["bytes"] == (files / "published.pth").stat().st_size

    assert inspect(files / "ours.pth", capsys)["classes"] == list("abcde")
    found = inspect(files / "detector.pth", capsys)
    assert (found["layout"], found["holds"]) == ("openmmlab", "detector or segmentor")
    assert found["parts"]["bbox_head"] == 3
    assert found["options"]["out_indices"] == [1, 3]

    assert run("inspect", files / "bare.pth") == 0
    text = capsys.readouterr().out
    assert "layout:           weights" in text and "5 classes" in text


def test_a_checkpoint_of_another_model_is_recognised(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    assert inspect(tmp_path / "other.pth", capsys)["holds"] == "weights of another model"
    for arguments in (("verify",), ("convert", tmp_path / "out.pth")):
        assert run(arguments[0], tmp_path / "other.pth", *arguments[1:]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / 'other.pth'}: holds no weights of Spatial-Mamba\n"


# --- names that frameworks give, and what they save with the weights


def averaged(model: SpatialMamba) -> dict[str, Tensor]:
    return AveragedModel(model).state_dict()  # module.* and n_averaged


def compiled_inside(model: SpatialMamba) -> dict[str, Tensor]:
    model.layers[0] = checkpoint_wrapper(torch.compile(model.layers[0]))
    return model.state_dict()


# The content of a file, whether timm's checkpoint_path reads its layout, and the prefix that the log names.
NAMINGS: dict[str, tuple[Callable[[SpatialMamba], dict[str, Any]], bool, str]] = {
    "data parallel": (lambda model: {"net": torch.nn.DataParallel(model).state_dict()}, False, ""),
    "compiled": (lambda model: {"model_state_dict": torch.compile(model).state_dict()}, False, ""),
    "compiled part": (compiled_inside, True, ""),
    "fsdp": (lambda model: prefixed("_fsdp_wrapped_module._orig_mod.", model.state_dict()), True, ""),
    "averaged": (averaged, True, ""),
    "averaged and trained by Lightning": (
        lambda model: {
            "state_dict": prefixed("model.", averaged(model)),
            "pytorch-lightning_version": "2.6.0",
            "callbacks": {"ModelCheckpoint": {"dirpath": Path("runs"), "best": PureWindowsPath("a\\b")}},
        },
        True,
        "model.",
    ),
    **{
        prefix: (lambda model, prefix=prefix: prefixed(prefix, model.state_dict()), True, prefix)
        for prefix in ("model.", "net.", "student.", "backbone.", "encoder.net.")
    },
}


@pytest.mark.parametrize(("wrap", "timm_reads", "prefix"), NAMINGS.values(), ids=NAMINGS)
def test_weights_are_found_under_the_names_of_frameworks(
    tmp_path: Path, wrap: Callable[[SpatialMamba], dict[str, Any]], timm_reads: bool, prefix: str, capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, content = tmp_path / "w.pth", wrap(classifier())
    torch.save(content, path)
    models = [load_classifier(path).model]
    assert caplog.messages == ([f"{path}: loading the weights named {prefix}* without this prefix"] if prefix else [])
    backbone = micro_backbone(pretrained=path)
    assert backbone.layers[3].blocks[0].mlp.fc1.weight.equal(classifier().layers[3].blocks[0].mlp.fc1.weight)
    assert inspect(path, capsys)["holds"] == "classifier"
    assert run("convert", path, tmp_path / "w.SafeTensors") == 0
    models.append(load_classifier(tmp_path / "w.SafeTensors").model)
    models.append(SpatialMamba(**MICRO))
    models[-1].load_state_dict(state_dict_of(content, "w.pth"))
    if timm_reads:
        models.append(timm.create_model("spatial_mamba_tiny", **MICRO, checkpoint_path=path))
    source = dict(file=str(path), num_classes=5)
    models.append(timm.create_model("spatial_mamba_tiny", pretrained=True, pretrained_cfg_overlay=source, **MICRO))
    assert {weights_digest(model.state_dict()) for model in models} == {weights_digest(classifier().state_dict())}


def test_other_entries_next_to_a_model_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = classifier().state_dict()
    torch.save(prefixed("model.", state) | {"loss.weight": torch.ones(5)}, tmp_path / "w.pth")
    assert weights_digest(load_classifier(tmp_path / "w.pth").model.state_dict()) == weights_digest(state)
    message = "loading the weights named model.* without this prefix; other entries are ignored: 1"
    assert caplog.messages == [f"{tmp_path / 'w.pth'}: {message}"]


@pytest.mark.parametrize("source", ["its own", "plain"])
def test_a_model_with_wrapped_parts_takes_its_own_weights_and_plain_ones(source: str) -> None:
    model = classifier(1)
    model.layers[0].blocks[0] = torch.compile(model.layers[0].blocks[0])
    expected = classifier()
    state = expected.state_dict()
    if source == "its own":
        state = {names: state[name] for name, names in zip(state, model.state_dict(), strict=True)}
        assert "layers.0.blocks.0._orig_mod.ln_1.weight" in state
    for load in (model.load_state_dict, lambda state: load_strictly(model, state_dict_of(state, "w.pth"), "w.pth")):
        torch.nn.init.zeros_(model.layers[0].blocks[0].ln_1.weight)
        load(state)
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_weights_of_several_models_are_not_guessed(files: Path, tmp_path: Path, capsys: Capture) -> None:
    both = {**prefixed("student.", classifier(0).state_dict()), **prefixed("teacher.", classifier(1).state_dict())}
    torch.save({"state_dict": both}, tmp_path / "both.pth")
    message = r"both\.pth: holds several models, named student\.\* and teacher\.\*; choose one, such as .* --prefix"
    for use in (load_classifier, lambda path: micro_backbone(pretrained=path)):
        with pytest.raises(WeightsError, match=message):
            use(tmp_path / "both.pth")
    assert run("convert", tmp_path / "both.pth", tmp_path / "teacher.pth", "--prefix", "teacher") == 0
    loaded = load_classifier(tmp_path / "teacher.pth").model
    assert weights_digest(loaded.state_dict()) == weights_digest(classifier(1).state_dict())
    assert run("inspect", tmp_path / "both.pth", "--prefix", "student.") == 0
    assert run("verify", tmp_path / "both.pth", "--prefix", "pupil") == 2
    assert "holds no weights whose names start with pupil." in capsys.readouterr().err

    state = classifier().state_dict()
    torch.save({"model": state, "net": state}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="holds weights under model and net; save only those you want to load"):
        load_classifier(tmp_path / "two.pth")
    torch.save(state | {"module.head.bias": state["head.bias"]}, tmp_path / "twice.pth")
    with pytest.raises(WeightsError, match=r"holds head\.bias twice, once with the name of a wrapper"):
        load_classifier(tmp_path / "twice.pth")
    part = {"patch_embed.conv1.conv.weight": torch.ones(1)}
    for other in (part, classifier().eval().fuse().state_dict()):  # not complete, or not loadable
        torch.save(prefixed("student.", state) | prefixed("teacher.", other), tmp_path / "a")
        load_classifier(tmp_path / "a")


class OfWindows:
    """Pickles like a Windows path, which other systems cannot create."""

    def __reduce__(self) -> tuple[Any, ...]:
        return WindowsPath, ("c:/", "runs")


def test_plain_values_next_to_the_weights_are_read(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, tzinfo=timezone.utc)
    values = dict(
        path=Path("runs/1"), pure=PurePosixPath("a"), windows=PureWindowsPath("c:/a"), moment=moment, day=moment.date(),
        hour=moment.time(), took=timedelta(3), counts=defaultdict(list, a=[1]), empty=defaultdict(float),
        ordered=OrderedDict(a=1), space=SimpleNamespace(a=Path("b")),
    )  # fmt: skip
    arguments = argparse.Namespace(output=Path("runs"))
    content = {"model": classifier().state_dict(), "args": arguments, "theirs": OfWindows(), **values}
    torch.save(content, tmp_path / "w.pth")
    read = read_checkpoint(tmp_path / "w.pth")
    assert read["theirs"] == PureWindowsPath("c:/runs")
    assert {key: read[key] for key in values} == values
    load_classifier(tmp_path / "w.pth")
    del content["theirs"]  # timm before 1.0.28 unpickles everything
    torch.save(content, tmp_path / "w.pth")
    timm.create_model("spatial_mamba_tiny", **MICRO, checkpoint_path=tmp_path / "w.pth")


# --- another number of channels, and other differences


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(in_chans=4), ("4 channels", "in_chans=4")),
        (dict(dims=16), ("dims 16", "dims=16")),
        (dict(depths=(1, 2, 1, 1)), ("depths 1-2-1-1", "depths=(1, 2, 1, 1)")),
        (dict(mlp_ratio=2.0), ("MLP ratio 2", "mlp_ratio=2.0")),
        (dict(fusion_dilations=(1, 2)), ("3x3 dilation 2", "fusion_dilations=(1, 2)")),
        (dict(fusion_dilations=(1, 3, 7)), ("3x3 dilation 7", "fusion_dilations=(1, 3, 7)")),
        (dict(fusion_kernel_sizes=5), ("5x5 dilation 1", "fusion_kernel_sizes=(5, 5, 5)")),
        (dict(num_classes=7), ("7 classes, but the model has 5", "num_classes=7")),
        (dict(num_classes=0), ("0 classes, but the model has 5", "num_classes=0")),
    ],
    ids=str,
)
def test_every_difference_between_models_is_named(change: dict[str, Any], named: tuple[str, str]) -> None:
    model, state = classifier(), classifier(**change).state_dict()
    with pytest.raises(WeightsError) as strict:
        load_strictly(model, state, "w.pth")
    with pytest.raises(RuntimeError) as own:
        model.load_state_dict(state)
    assert all(words in str(strict.value) for words in named)
    assert str(own.value) == str(strict.value).replace("w.pth", "state_dict")
    assert str(architecture_of(state)) != str(architecture_of(model.state_dict()))


def test_backbones_and_classifiers_are_distinguished() -> None:
    last, two = micro_backbone(out_indices=(3,)), micro_backbone(out_indices=(1, 3))
    for model, other, message in (
        (last, two, r"out_indices=\(1, 3\), but the model has \(3,\); build the model with those"),
        (last, classifier(), "holds a classifier, but the model is a backbone; start from the file with pretrained="),
        (classifier(), last, "holds a backbone, but the model is a classifier; use the file of a classifier"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_start_from_rgb_weights(
    files: Path, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = adapt_input_conv(channels, classifier().patch_embed.conv1.conv.weight)
    backbone = micro_backbone(in_chans=channels, pretrained=files / "bare.pth")
    assert caplog.messages == [
        f"{files / 'bare.pth'}: adapting its first convolution from 3 input channels to {channels}"
    ]
    source = dict(file=str(files / "bare.pth"), num_classes=5)
    model = timm.create_model(
        "spatial_mamba_tiny", pretrained=True, pretrained_cfg_overlay=source, in_chans=channels, **MICRO
    )
    for started in (backbone, model):
        torch.testing.assert_close(started.patch_embed.conv1.conv.weight, expected)
    with pytest.raises(RuntimeError, match=f"holds another model.* {channels} channels; .*with in_chans=3"):
        timm.create_model("spatial_mamba_tiny", in_chans=channels, checkpoint_path=files / "bare.pth", **MICRO)
    with pytest.raises(WeightsError, match=r"with in_chans=1$"):  # no rule for making RGB from it
        load_strictly(classifier(), classifier(in_chans=1).state_dict(), "w.pth")


# --- conversion


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_published_checkpoint_becomes_a_classifier(files: Path, tmp_path: Path, ema: bool, ending: str) -> None:
    target = tmp_path / f"classifier{ending}"
    assert run("convert", files / "published.pth", target, *(["--ema"] if ema else [])) == 0
    loaded = load_classifier(target)
    assert weights_digest(loaded.model.state_dict()) == weights_digest(classifier(int(ema)).state_dict())
    assert (loaded.preprocessing.image_size, loaded.preprocessing.crop) == (48, False)
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("source", ["published.pth", "ours.pth", "bare.pth", "detector.pth"])
@pytest.mark.parametrize("layout", ["backbone", "openmmlab"])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_backbones_take_every_layout(files: Path, tmp_path: Path, source: str, layout: str, ending: str) -> None:
    target = tmp_path / f"backbone{ending}"
    assert run("convert", files / source, target, "--to", layout) == 0
    taken, directly = (
        micro_backbone(out_indices=(1, 3), pretrained=path).state_dict() for path in (target, files / source)
    )
    assert weights_digest(taken) == weights_digest(directly)
    saved = state_dict_of(read_checkpoint(files / source), source)
    saved = {name.removeprefix("backbone."): tensor for name, tensor in saved.items()}
    own = [name for name in taken if not name.startswith("outnorm")]
    assert len(own) > 50 and all(torch.equal(taken[name], saved[name]) for name in own)


def test_training_checkpoints_go_to_the_published_layout_and_back(files: Path, tmp_path: Path, capsys: Capture) -> None:
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    assert run("convert", files / "published.pth", ours, "--to", "trainer") == 0
    assert run("convert", ours, back, "--to", "published") == 0
    assert inspect(ours, capsys)["layout"] == "trainer"
    before, after = read_checkpoint(files / "published.pth"), read_checkpoint(back)
    assert before.keys() - after.keys() == {"scaler"}  # an empty one, which no scaler takes
    for key in ("model", "model_ema"):
        assert weights_digest(before[key]) == weights_digest(after[key])
    for key in ("epoch", "steps", "max_accuracy", "max_accuray_ema", "lr_scheduler", "config"):
        assert before[key] == after[key]
    decays = [group["weight_decay"] for group in read_checkpoint(back)["optimizer"]["param_groups"]]
    assert decays == [0.05, 0.0]  # in the order of the published trainer, which is not timm's
    with zipfile.ZipFile(back) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        assert b"yacs.config\nCfgNode" in archive.read(pickled)  # the published code reads its attributes


def test_conversion_refuses_what_cannot_be(files: Path, tmp_path: Path, capsys: Capture) -> None:
    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert run("convert", *arguments) == 2
        output = capsys.readouterr().err
        assert output.count("\n") == 1
        return output

    published_file, target = files / "published.pth", tmp_path / "out.safetensors"
    assert "must end in .safetensors, .pth" in refused(published_file, tmp_path / "out.onnx")
    assert "holds weights only; a trainer checkpoint" in refused(published_file, target, "--to", "trainer")
    assert "is the file to convert" in refused(published_file, published_file)
    assert "holds no EMA weights" in refused(files / "ours.pth", target, "--ema")
    assert "holds a backbone without a classifier" in refused(files / "detector.pth", target)
    torch.save(classifier().eval().fuse().state_dict(), tmp_path / "fused.pth")
    assert "holds the weights of a fused model" in refused(tmp_path / "fused.pth", target)
    assert inspect(tmp_path / "fused.pth", capsys)["holds"] == "weights of another model"
    for name in ("out.pth", "out.safetensors"):
        assert "cannot be written" in refused(published_file, tmp_path / "absent" / name)
    torch.save({"model": classifier(fusion_dilations=(1, 2)).state_dict()}, tmp_path / "ablated.pth")
    ablated = refused(tmp_path / "ablated.pth", tmp_path / "out.pth", "--to", "published")
    assert "its fusion, 3x3 dilation 1, 3x3 dilation 2, does not exist in the published code" in ablated
    torch.save({"model": classifier().state_dict(), "config": {"x": torch.ones(1)}}, tmp_path / "odd.pth")
    assert "holds more than text and numbers" in refused(tmp_path / "odd.pth", target)
    assert not target.exists()
    for damaged in ({"optimizer": {"param_groups": [{}]}}, {"config": {"x": torch.ones(1)}}, {"config": [1]}):
        torch.save({"model": classifier().state_dict(), **damaged}, tmp_path / "odd.pth")
        error = refused(tmp_path / "odd.pth", tmp_path / "out.pth", "--to", "published")
        assert "the published code could not read its optimiser or config" in error


# --- verification


def test_verification_recognises_weights_in_any_file(files: Path, tmp_path: Path, capsys: Capture) -> None:
    run("convert", files / "published.pth", tmp_path / "model.safetensors")
    digests = []
    for path in (files / "published.pth", files / "bare.pth", tmp_path / "model.safetensors"):
        capsys.readouterr()
        assert run("verify", path) == 0
        _, digest, logits = capsys.readouterr().out.splitlines()
        digests.append(digest.removeprefix("weights  sha256 "))
        with torch.no_grad():
            largest = classifier().double()(fixed_image(3)).max().item()
        assert logits.startswith("largest logits of the fixed image (224x224): class ")
        assert f"{largest:.6g}," in logits
    assert digests == [weights_digest(classifier().state_dict())] * 3

    assert run("verify", files / "published.pth", "--ema", "--expect", digests[0]) == 2
    assert "the digest of its weights is" in capsys.readouterr().err
    assert run("verify", files / "published.pth", "--expect", digests[0][:12].upper()) == 0
    assert run("verify", files / "detector.pth") == 0  # its backbone
    capsys.readouterr()
    torch.save(classifier(num_classes=0).state_dict(), tmp_path / "headless.pth")
    assert run("verify", tmp_path / "headless.pth") == 0
    assert "largest logits" not in capsys.readouterr().out
    diverged = {name: t * math.nan if t.is_floating_point() else t for name, t in classifier().state_dict().items()}
    torch.save(diverged, tmp_path / "diverged.pth")
    assert run("verify", tmp_path / "diverged.pth") == 2
    assert "its outputs are not finite" in capsys.readouterr().err
    assert run("verify", files / "published.pth", "--variant", "tiny") == 2
    assert "holds custom (dims 8" in capsys.readouterr().err


# --- unusable files


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda source, path: path.write_bytes(source.read_bytes()[:-9000]), "truncated"),
        (
            lambda source, path: torch.save({"config": LeavesATrace(path.parent / "trace")}, path),
            "refused, because it asks to load posix.mkdir",
        ),
    ],
    ids=["truncated", "malicious"],
)
@pytest.mark.parametrize("use", ["inspect", "verify", "convert", "classify"])
def test_an_unusable_file_gets_one_line(
    files: Path, tmp_path: Path, capsys: Capture, write: Callable[[Path, Path], None], message: str, use: str
) -> None:
    path = tmp_path / "weights.pth"
    write(files / "bare.pth", path)
    if use == "classify":
        Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
        status = prediction.main([str(tmp_path / "image.png"), "--checkpoint", str(path)])
    else:
        status = run(use, path, *([tmp_path / "out.pth"] if use == "convert" else []))
    output = capsys.readouterr().err
    assert status == 2
    assert output.startswith(f"error: {path}: ") and message in output and output.count("\n") == 1
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out.pth").exists()


# --- folders of the Hub, and timm's


@pytest.mark.parametrize("options", [{}, {"fusion_dilations": (2,), "num_classes": 7}], ids=["default", "changed"])
def test_a_saved_folder_gives_the_same_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = classifier(**options)
    model.reset_classifier(3)
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = SpatialMamba.from_pretrained(tmp_path / "model")
    assert again.num_classes == 3 and not again.training
    assert weights_digest(again.state_dict()) == weights_digest(model.state_dict())


def test_a_backbone_is_saved_without_the_path_it_came_from(files: Path, tmp_path: Path) -> None:
    model = micro_backbone(pretrained=str(files / "bare.pth"))
    model.save_pretrained(tmp_path / "model")
    assert "pretrained" not in json.loads((tmp_path / "model" / "config.json").read_text())
    again = SpatialMambaBackbone.from_pretrained(tmp_path / "model")
    assert weights_digest(again.state_dict()) == weights_digest(model.state_dict())


def test_the_hub_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = {}

    class Api:
        """Accepts a folder, as the Hub does."""

        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **_: object) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            uploaded["to"] = repo_id
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = classifier()
    model.push_to_hub("someone/spatial-mamba-micro")
    assert uploaded == {"to": "someone/spatial-mamba-micro"}
    again = SpatialMamba.from_pretrained(tmp_path / "hub")
    assert weights_digest(again.state_dict()) == weights_digest(model.state_dict())


def test_a_folder_whose_weights_do_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dims": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"model\.safetensors: holds another model, custom \(dims 8"):
        SpatialMamba.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"its options do not fit SpatialMambaBackbone \(.*'drop_rate'"):
        SpatialMambaBackbone.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="a fused model cannot be saved"):
        classifier().fuse().save_pretrained(tmp_path)
    pruned = classifier()
    pruned.prune_intermediate_layers([1])
    with pytest.raises(RuntimeError, match=r"cannot be saved because it has changed since it was made: it does not"):
        pruned.save_pretrained(tmp_path)


def test_pickled_weights_in_a_folder_of_the_hub_are_loaded_strictly(tmp_path: Path) -> None:
    model = SpatialMamba(**MICRO)
    torch.save({f"{name}.x": tensor for name, tensor in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: does not fit this model"):
        SpatialMamba._load_as_pickle(model, str(tmp_path / "pytorch_model.bin"), "cpu", False)


needs_local_dir = pytest.mark.skipif(parse(timm.__version__) < parse("1.0.16"), reason="needs timm 1.0.16")


@pytest.mark.parametrize(
    "how", ["checkpoint_path", "pretrained file", pytest.param("local-dir", marks=needs_local_dir)]
)
def test_timm_loads_our_files(files: Path, tmp_path: Path, how: str) -> None:
    model = timm.create_model("spatial_mamba_tiny", **MICRO)
    if how == "local-dir":
        save_for_hf(model, tmp_path, model_args=MICRO)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        expected = model
    elif how == "checkpoint_path":  # timm loads the EMA weights if there are any
        loaded = timm.create_model("spatial_mamba_tiny", **MICRO, checkpoint_path=files / "published.pth")
        expected = classifier(1)
    else:
        source = dict(file=str(files / "bare.pth"), num_classes=5)
        loaded = timm.create_model(
            "spatial_mamba_tiny", pretrained=True, pretrained_cfg_overlay=source, **MICRO | {"num_classes": 9}
        )
        assert loaded.num_classes == 9
        loaded.reset_classifier(0)
        expected = classifier()
        expected.reset_classifier(0)
    assert weights_digest(loaded.state_dict()) == weights_digest(expected.state_dict())


# --- paths and systems


def test_the_home_folder_is_known_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    torch.save(classifier(depths=(1,)).state_dict(), tmp_path / "w.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    load_classifier("~/w.pth")
    micro_backbone(depths=(1,), out_indices=(0,), pretrained="~/w.pth")
    with pytest.raises(WeightsError, match=r"~no_such_user/w\.pth: no such checkpoint file"):
        load_classifier("~no_such_user/w.pth")
    assert run("convert", "~/w.pth", "~/out.safetensors") == 0
    assert prediction.main(["~/*.png", "--checkpoint=~/out.safetensors"]) == 0
    options = ["~/image.png", "--checkpoint=~/w.pth", "--size=32", "--output=~/states.png"]
    assert visualize_command.main(["states", *options]) == 0
    assert export_command.main(["--checkpoint=~/w.pth", "--size=32", "--format=torch", "--output=~/w.pt2"]) == 0
    assert {"out.safetensors", "states.png", "w.pt2"} <= {path.name for path in tmp_path.iterdir()}

    (tmp_path / "base.yaml").write_text("OUTPUT: ~/runs\nTAG: ~tag\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/own.yaml").write_text("BASE: [~/base.yaml]\nMODEL: {RESUME: ~/r.pth}\n")
    config, _ = load_config("~/sub/own.yaml", [("DATA.DATA_PATH", "~/data"), ("MODEL.PRETRAINED", "~/w.pth")])
    paths = config.OUTPUT, config.DATA.DATA_PATH, config.MODEL.PRETRAINED, config.MODEL.RESUME
    assert paths == tuple(str(tmp_path / name) for name in ("runs", "data", "w.pth", "r.pth"))
    assert config.TAG == "~tag"


# --- classifying images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.PNG"):
        Image.fromarray(generator.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def classify(*arguments: object) -> int:
    return prediction.main([str(argument) for argument in arguments])


def test_images_are_classified(files: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    ours = ("--checkpoint", files / "ours.pth")
    assert classify(images, images / "*.png", images / "a.png", *ours, "--json", "--top-k", "9") == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(result["image"]).name for result in results] == ["a.png", "b.jpg", "c.PNG", "a.png", "a.png"]
    assert results[0] == results[3] == results[4]

    loaded = load_classifier(files / "ours.pth")
    with Image.open(images / "b.jpg") as image, torch.no_grad():
        shares = loaded.model(loaded.preprocessing.transform()(image.convert("RGB"))[None])[0].softmax(0)
    for entry in results[1]["classes"]:
        assert entry["probability"] == pytest.approx(shares[entry["index"]].item(), rel=1e-4)
        assert entry["name"] == "abcde"[entry["index"]]
    order = [entry["probability"] for entry in results[1]["classes"]]
    assert order == sorted(order, reverse=True) and len(order) == 5

    assert classify(images / "a.png", "--checkpoint", files / "published.pth", "--ema", "--top-k", "2") == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{images / 'a.png'}: class ") and line.count("%") == 2

    shutil.copy(images / "a.png", tmp_path / "a\nb.png")
    shutil.copy(images / "notes.txt", tmp_path / "c\nd.png")
    assert classify(tmp_path, "--checkpoint", files / "published.pth") == 2
    output = capsys.readouterr()
    assert r"a\nb.png: class " in output.out and output.out.count("\n") == 1
    assert "d.png: cannot be read" in output.err and output.err.count("\n") == 2


def test_class_names_come_from_a_file_the_checkpoint_or_imagenet(files: Path, tmp_path: Path) -> None:
    names = prediction.class_names
    listed = tmp_path / "names.txt"
    listed.write_text("v\nw\nx\ny\nz\n", encoding="utf-8-sig")  # as Windows programs write it
    assert names(load_classifier(files / "ours.pth"), listed) == list("vwxyz")
    imagenet = prediction.TrainedClassifier(classifier(num_classes=1000))
    assert names(imagenet)[207] == "golden retriever"
    synsets = prediction.TrainedClassifier(classifier(num_classes=2), class_names=("n02099601", "mine"))
    assert names(synsets) == ["golden retriever", "mine"]


def test_wrong_images_and_names_get_one_line(files: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    ours = ("--checkpoint", files / "ours.pth")
    empty, listed, damaged = tmp_path / "empty", tmp_path / "names.txt", images / "damaged.png"
    empty.mkdir()
    listed.write_text("one\ntwo\n")
    damaged.write_bytes((images / "a.png").read_bytes()[:300])
    for arguments, message in (
        ((images / "absent.png",), "no such image or folder"),
        (("https://example.org/a.png",), "https://example.org/a.png: is a URL; download the image"),
        ((images / "notes.txt",), "not an image file"),
        ((empty,), "no images in this folder"),
        ((empty.parent,), f"; for those in its subfolders: '{empty.parent}/**/*'"),
        ((images / "x*.png",), "no image matches this pattern"),
        ((images / "a.png", "--classes", listed), "has 2 lines for the model's 5 classes"),
        ((images / "a.png", "--top-k", "0"), "must be a whole number of at least 1"),
    ):
        assert classify(*arguments, *ours) == 2
        output = capsys.readouterr()
        assert message in output.err and output.err.count("\n") == 1 and not output.out

    assert classify(damaged, images / "a.png", *ours) == 2  # the others are still classified
    output = capsys.readouterr()
    assert f"{images / 'a.png'}: " in output.out
    assert "damaged.png: cannot be read as an image" in output.err and "1 of 2 images could not be read" in output.err
