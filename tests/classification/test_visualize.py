"""The pictures: they show what the model computes and what the run recorded; the commands that draw them."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spatial_mamba import SpatialMamba
from spatial_mamba.classification import visualize
from spatial_mamba.classification.models.preprocessing import Preprocessing
from spatial_mamba.classification.visualize import command
from spatial_mamba.classification.visualize.curves_picture import draw_curves
from spatial_mamba.classification.visualize.formulations import (
    FORMULATIONS,
    LINEAR_ATTENTION,
    MAMBA,
    SPATIAL_MAMBA,
    activation,
    magnitude,
    matrix_row,
)
from spatial_mamba.classification.visualize.inputs import visible_image
from spatial_mamba.classification.visualize.layers import (
    ScanLayer,
    fusion_change,
    most_changed,
    parse_layer,
    read_layer,
    standardised,
)
from spatial_mamba.classification.visualize.receptive_field import ReceptiveField, noise_batches, receptive_field
from spatial_mamba.classification.visualize.run_records import read_run, short_labels
from spatial_mamba.classification.visualize.states_picture import LIMIT, draw_states
from spatial_mamba.classification.visualize.style import COLOURS, number
from spatial_mamba.kernels import gated_norm, structure_aware_scan
from spatial_mamba.kernels.errors import UserError

from .micro_models import FUSIONS, micro_classifier

CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]


def micro(**changes: Any) -> SpatialMamba:
    """A model in float64 whose states and fusion matter."""
    model = micro_classifier(**dict(depths=(1, 2, 1, 1)) | changes).double().eval()
    for name, parameter in model.named_parameters():
        if "state_fusion" in name:
            torch.nn.init.uniform_(parameter, -1, 1)
        elif "dt_projs_bias" in name or "A_logs" in name:
            torch.nn.init.uniform_(parameter, -2, 1)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mixer_of(model: SpatialMamba) -> nn.Module:
    return model.layers[1].blocks[1].self_attention


def layer_of(model: SpatialMamba) -> ScanLayer:
    """The layer of this mixer on a map of 5x7 tokens, smaller than the reach of the published fusion."""
    return read_layer(model, noise(1, 3, 40, 56), 1, 1)


def scan_output(layer: ScanLayer, model: SpatialMamba) -> Tensor:
    """The output of the model's operator on the same tokens: (1, H, W, D)."""
    ssm = mixer_of(model)
    u = layer.u.T.reshape(1, layer.height, layer.width, -1)
    branches = ssm.state_fusion.branches(ssm.Ds)
    core = (ssm.dt_projs_weight, ssm.dt_projs_bias, ssm.A_logs.squeeze(1), ssm.Ds)
    with torch.no_grad():
        return structure_aware_scan(u, F.linear(u, ssm.x_proj_weight), *core, *branches)


def matrix(layer: ScanLayer, formulation: str) -> Tensor:
    """All of M: (queries, D, L)."""
    queries = [(row, column) for row in range(layer.height) for column in range(layer.width)]
    return torch.stack([matrix_row(layer, formulation, *query) for query in queries])


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# --- what is read from a layer


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_read_gives_the_output_of_the_layer(fusion: str) -> None:
    model = micro(**FUSIONS[fusion])
    ssm = mixer_of(model)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = ssm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    layer = layer_of(model)
    hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    ((tokens, output),) = seen
    assert (layer.height, layer.width, layer.channels) == (5, 7, 32) == (*tokens.shape[1:3], ssm.inner_dim)

    y = layer.C.view(1, 5, 7) * layer.fused_states() + (ssm.Ds.detach()[:, None] * layer.u).view(-1, 5, 7)
    exactly(y.permute(1, 2, 0)[None], scan_output(layer, model))
    with torch.no_grad():
        gate = ssm.in_proj(tokens)[..., ssm.inner_dim :]
        gated = gated_norm(y.permute(1, 2, 0)[None], gate, ssm.out_norm.weight, ssm.out_norm.bias, ssm.out_norm.eps)
        exactly(ssm.out_proj(gated), output)


def test_states_are_those_of_the_recurrence() -> None:
    layer = layer_of(micro())
    assert (layer.delta > 0).all() and (layer.A < 0).all()
    h, states = torch.zeros(layer.channels, dtype=torch.float64), []
    for t in range(35):
        h = torch.exp(layer.delta[:, t] * layer.A) * h + layer.delta[:, t] * layer.B[t] * layer.u[:, t]
        states.append(h)
    exactly(layer.states(), torch.stack(states, dim=1).view(-1, 5, 7))


def test_without_fusion_states_stay_as_they_are() -> None:
    layer = layer_of(micro(fusion_dilations=()))
    before, after = layer.states(), layer.fused_states()
    exactly(after, before)
    assert fusion_change(before, after).abs().max() < 1e-12


def test_change_ignores_scale_and_finds_the_channel_that_was_mixed() -> None:
    before = noise(4, 6, 6)
    before[3] = 2.0
    after = 27 * before + 1
    after[2] = -before[2]
    change = fusion_change(before, after)
    exactly(change, torch.tensor([0.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    assert most_changed(change, 1) == [2] and len(most_changed(change, 9)) == 4
    patterns = standardised(before)
    exactly(patterns[0].std(correction=0), torch.tensor(1.0, dtype=torch.float64))
    assert not patterns[3].any()


def test_layers_have_names() -> None:
    model = micro()
    assert parse_layer("1.1", model, 0) == (1, 1)
    assert parse_layer(None, model, 1) == (1, 1) and parse_layer(None, model, 9) == (3, 0)
    for wrong in ("4.0", "1.2", "1", "-1.0", "a.b"):
        with pytest.raises(UserError, match=r"--layer .*: must be STAGE.BLOCK.* are 0\.0, 1\.1, 2\.0, 3\.0"):
            parse_layer(wrong, model, 0)


# --- the matrix M


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_matrix_times_the_tokens_is_the_output(fusion: str, formulation: str) -> None:
    model = micro(**FUSIONS[fusion])
    layer = layer_of(model)
    y = torch.einsum("idj,dj->di", matrix(layer, formulation), layer.u).view(-1, 5, 7)
    exactly(activation(layer, formulation), y)
    if formulation == SPATIAL_MAMBA or (formulation == MAMBA and fusion == "none"):
        skipped = (mixer_of(model).Ds.detach()[:, None] * layer.u).view(-1, 5, 7)
        exactly((y + skipped).permute(1, 2, 0)[None], scan_output(layer, model))


def test_rows_look_back_unless_states_are_fused() -> None:
    layer = layer_of(micro())
    query = 2 * 7 + 3
    for formulation in (LINEAR_ATTENTION, MAMBA):
        weights = magnitude(matrix_row(layer, formulation, 2, 3))
        assert not weights[query + 1 :].any() and weights[: query + 1].all()
    ahead = magnitude(matrix_row(layer, SPATIAL_MAMBA, 2, 3))
    assert ahead[query + 1 :].any()


def test_rows_by_hand() -> None:
    layer = layer_of(micro())
    row = matrix_row(layer, LINEAR_ATTENTION, 0, 2)
    exactly(row[5, :3], layer.C[2] * layer.B[:3])
    decays = torch.exp(layer.delta * layer.A[:, None])
    expected = layer.C[2] * torch.stack(
        [
            decays[:, 1] * decays[:, 2] * layer.delta[:, 0] * layer.B[0],
            decays[:, 2] * layer.delta[:, 1] * layer.B[1],
            layer.delta[:, 2] * layer.B[2],
        ],
        dim=1,
    )
    exactly(matrix_row(layer, MAMBA, 0, 2)[:, :3], expected)


def test_a_layer_that_forgets_everything_does_not_divide_by_zero() -> None:
    layer = layer_of(micro())
    layer.A.fill_(-1e6)
    row = matrix_row(layer, MAMBA, 2, 3)
    exactly(row.sum(1), layer.C[17] * layer.delta[:, 17] * layer.B[17])


# --- the effective receptive field


def test_contribution_is_the_gradient() -> None:
    model, images = micro(), noise(1, 3, 32, 32)
    field = receptive_field(model, [images], stage=1)

    def features(images: Tensor) -> float:
        with torch.no_grad():
            x = model.patch_embed(images)
            for stage in model.layers[:2]:
                out, x = stage(x)
        return float(out[0, 2, 2].sum())  # the middle of 4x4 tokens

    for row, column in ((16, 16), (3, 20)):
        slopes = []
        for colour in range(3):
            step = torch.zeros_like(images)
            step[0, colour, row, column] = 1e-6
            slopes.append((features(images + step) - features(images - step)) / 2e-6)
        assert float(field.contribution[row, column]) == pytest.approx(sum(map(abs, slopes)), rel=1e-4, abs=1e-9)


def test_contributions_are_averaged_over_images() -> None:
    model, images = micro(), noise(3, 3, 32, 32)
    whole = receptive_field(model, [images], stage=0)
    exactly(receptive_field(model, images.split(2), stage=0).contribution, whole.contribution)
    singles = [receptive_field(model, [image[None]], stage=0).contribution for image in images]
    exactly(torch.stack(singles).mean(dim=0), whole.contribution)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stage", [0, 2])
def test_the_field_of_an_untrained_model_is_centred(stage: int) -> None:
    model = micro_classifier(depths=(1, 2, 1, 1)).eval()
    field = receptive_field(model, noise_batches(8, 64, CPU, 4), stage)
    assert field.centre == (32, 32) and field.contribution.shape == (64, 64)
    fraction = field.contribution / field.contribution.sum()
    rows, columns = fraction.sum(dim=1), fraction.sum(dim=0)
    for marginal in (rows, columns):
        assert float(marginal @ torch.arange(64.0, dtype=torch.float64)) == pytest.approx(32, abs=3)
    areas = [field.area(part) for part in (0.3, 0.5, 0.9, 0.99)]
    assert areas == sorted(areas) and areas[1] < 0.35
    assert field.reach(0.5) < field.reach(0.99)


def test_fractions_of_known_fields() -> None:
    point = torch.zeros(9, 9, dtype=torch.float64)
    point[4, 4] = 3.0
    assert ReceptiveField(point, (4, 4)).area(0.99) == pytest.approx(1 / 81)
    flat = ReceptiveField(torch.ones(9, 9, dtype=torch.float64), (4, 4))
    assert flat.area(0.3) == pytest.approx(25 / 81) and flat.area(1.0) == 1.0
    aside = ReceptiveField(torch.ones(4, 9, dtype=torch.float64), (0, 0))  # squares are cut off at the borders
    areas, inside = aside.growth()
    assert areas.tolist() == inside.tolist() == pytest.approx([n / 36 for n in (1, 4, 9, 16, 20, 24, 28, 32, 36)])


def test_non_finite_weights_are_reported() -> None:
    model = micro()
    model.patch_embed.conv1.conv.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the gradient of the features is zero or not finite"):
        receptive_field(model, [noise(1, 3, 32, 32)], stage=0)


# --- the records of runs


def write_run(path: Path, epochs: int, **changes: Any) -> Path:
    """Write a record like the trainer's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(
            epoch=epoch,
            train_loss=2.0 / (1 + epoch),
            learning_rate=1e-3,
            gradient_norm=None if epoch == 1 else 5.0,
            skipped_updates=int(epoch == 2) * 4,
            val_acc1=50.0 + epoch,
            val_loss=1.0,
            **changes,
        )
        for epoch in range(epochs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records_are_read_from_the_folder_or_the_file(tmp_path: Path) -> None:
    file = write_run(tmp_path / "run" / "metrics.jsonl", 3, ema_acc1=10.0)
    for path in (file, file.parent):
        run = read_run(path, "a")
        assert run.label == "a" and run.epochs.tolist() == [1, 2, 3]
        assert run.values["val_acc1"].tolist() == [50, 51, 52] and run.has("ema_acc1")
        assert np.isnan(run.values["gradient_norm"][1]) and not run.has("ema_loss")


def test_labels_are_as_short_as_possible(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "best.pth").touch()
    paths = [tmp_path / name for name in ("a/x", "b/x", "b/y")]
    assert short_labels(paths) == ["a/x", "b/x", "b/y"]
    assert short_labels(paths[1:]) == ["x", "y"]
    assert short_labels([path / "best.pth" for path in paths[1:]]) == ["x", "y"]
    assert short_labels([paths[0] / "best.pth"]) == ["best"]
    assert len(short_labels([paths[0], paths[0]])) == 2


# --- the pictures


def test_numbers_in_captions() -> None:
    assert number(-0.0161) == "$-0.016$" and number(2.04e-5) == r"$2 \times 10^{-5}$"


def test_the_image_is_shown_as_the_model_gets_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = Preprocessing(image_size=32, crop=False).transform()(Image.fromarray(pixels))
    assert np.abs(visible_image(tensor) - pixels / 255).max() < 1e-6


def test_states_share_one_scale() -> None:
    layer = layer_of(micro())
    before, after = layer.states(), layer.fused_states()
    figure = draw_states(np.zeros((8, 8, 3)), before, after, [3, 0], "layer 1.1")
    maps = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (5, 7)]
    assert [image.get_clim() for image in maps] == [(-LIMIT, LIMIT)] * 4
    expected = [standardised(states)[channel] for states in (before, after) for channel in (3, 0)]
    for image, states in zip(maps, expected, strict=True):
        assert np.array_equal(image.get_array(), states.numpy())


def test_curves_show_the_values_of_the_runs(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a.jsonl", 3, ema_acc1=10.0), "first"),
        read_run(write_run(tmp_path / "b.jsonl", 2), "second"),
    ]
    figure = draw_curves(runs)
    loss, accuracy, rate, norm = figure.axes
    drawn = {line.get_color(): line.get_ydata().tolist() for line in loss.lines if line.get_linestyle() == "-"}
    assert drawn == {COLOURS[0]: [2.0, 1.0, 2 / 3], COLOURS[1]: [2.0, 1.0]}
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[50, 51, 52], [10, 10, 10], [50, 51]]
    assert [line.get_xdata().tolist() for line in rate.lines] == [[1, 2, 3], [1, 2]]
    assert [(text.get_text(), text.xy) for text in norm.texts] == [("4", (3, 5.0))]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


def test_the_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    matplotlib.rcParams["font.size"] = 13
    try:
        draw_curves([read_run(write_run(tmp_path / "a.jsonl", 1), "a")])
        assert matplotlib.rcParams["font.size"] == 13
    finally:
        matplotlib.rcParams["font.size"] = matplotlib.rcParamsDefault["font.size"]


# --- the commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and an image."""
    folder = tmp_path_factory.mktemp("files")
    config = {"DATA": {"IMG_SIZE": 48}, "TEST": {"CROP": False}}
    for name, fusion in (("fused", FUSIONS["published"]), ("plain", FUSIONS["none"])):
        model = micro(**fusion).float()
        torch.save({"model": model.state_dict(), "model_ema": None, "config": config}, folder / f"{name}.pth")
    torch.save(micro_classifier(in_chans=1).state_dict(), folder / "grey.pth")
    rows, columns = np.mgrid[:60, :80]
    pixels = np.stack([rows * 4, columns * 3, 255 * (rows > columns)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    (folder / "broken.png").write_bytes(b"none")
    write_run(folder / "run" / "metrics.jsonl", 3)
    return folder


def run(files: Path, tmp_path: Path, line: str) -> tuple[int, Path]:
    """Run a command, where ``@NAME`` stands for a file of the fixture; return its exit status and its picture."""
    words = [str(files / word[1:]) if word.startswith("@") else word for word in line.split()]
    output = tmp_path / "made" / "picture.png"
    return command.main([*words, "--output", str(output)]), output


PICTURES = {
    "states @image.png --checkpoint @fused.pth": 2111,
    "states @image.png --checkpoint @plain.pth --layer 3.0 --channel 7": 1272,
    "attention @image.png --checkpoint @fused.pth --query 0 5 --size 64": 2160,
    "attention @image.png --model spatial_mamba_tiny --layer 0.0 --size 32": 2160,
    "receptive-field --checkpoint @fused.pth @plain.pth --untrained --images 2": 1650,
    "receptive-field @image.png --checkpoint @fused.pth --stage 1 --labels ours": 1140,
    "receptive-field --model spatial_mamba_tiny spatial_mamba_base --images 1 --size 32": 1650,
    "curves @run @run/metrics.jsonl --labels one two": 2160,
}


@pytest.mark.parametrize("line", PICTURES)
def test_every_command_draws_its_picture(line: str, files: Path, tmp_path: Path, capsys: Capture) -> None:
    status, output = run(files, tmp_path, line)
    assert status == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    with Image.open(output) as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert picture.width == pytest.approx(PICTURES[line], abs=1)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    inked = (pixels < 250).any(axis=2)
    assert 0.02 < inked.mean() < 0.98
    for edge in (inked[0], inked[-1], inked[:, 0], inked[:, -1]):
        assert not edge.any()  # nothing is cut off
    assert (np.ptp(pixels, axis=2) > 60).mean() > 0.001  # there is colour in it


def test_fractions_are_printed(files: Path, tmp_path: Path, capsys: Capture) -> None:
    status, _ = run(files, tmp_path, "receptive-field --checkpoint @fused.pth --untrained --images 1")
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["fused, untrained", "fused"]
    assert all("30 % in" in line and "99 % in" in line for line in lines[:2])


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_other_formats_follow_the_ending(ending: str, start: bytes, files: Path, tmp_path: Path) -> None:
    output = tmp_path / f"curves.{ending}"
    assert command.main(["curves", str(files / "run"), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(start)


ERRORS = {
    "states @none.png --checkpoint @fused.pth": "none.png: no such image or folder",
    "states @broken.png --checkpoint @fused.pth": "broken.png: cannot be read as an image",
    "states @ --checkpoint @fused.pth": "2 images; name one of them, such as",
    "states @image.png --checkpoint @none.pth": "none.pth: no such checkpoint file",
    "states @image.png --checkpoint @grey.pth": "takes images of 1 channels; RGB is needed",
    "states @image.png": "one of the arguments --checkpoint --model is required",
    "states @image.png --checkpoint @fused.pth --layer 1.2": "--layer 1.2: must be STAGE.BLOCK, both from 0",
    "states @image.png --checkpoint @fused.pth --channel 16": "--channel 16: layer 0.0 has channels 0 to 15",
    "states @image.png --checkpoint @fused.pth --channel -1": "argument --channel: must be auto or a channel, from 0",
    "states @image.png --checkpoint @fused.pth --size 31": "argument --size: must be at least 32 pixels, got 31",
    "attention @image.png --checkpoint @fused.pth --query 6 0": "--query 6 0: layer 1.1 has rows 0 to 5 and columns 0",
    "attention @image.png --checkpoint @fused.pth --query 0 -1": "--query 0 -1: layer 1.1 has rows",
    "receptive-field": "name one or more models: --checkpoint FILE ... or --model NAME ...",
    "receptive-field --model spatial_mamba_tiny --ema": "--ema and --untrained go with a --checkpoint",
    "receptive-field --checkpoint @fused.pth --stage 4": "--stage 4: the model has stages 0 to 3",
    "receptive-field --checkpoint @fused.pth --labels a b": "--labels: 2 are given for 1 in the picture: fused",
    "receptive-field --checkpoint @fused.pth --images 0": "argument --images: must be a whole number of at least 1",
    f"receptive-field --checkpoint {' '.join(['@fused.pth'] * 8)}": "8 models do not fit in one picture",
    "curves @none": "none: no such file; name the folder of a training run, or its metrics.jsonl",
    f"curves {' '.join(['@run'] * 8)}": "8 runs do not fit in one picture; name at most 7",
}


@pytest.mark.parametrize("line", ERRORS)
def test_wrong_input_is_one_line(line: str, files: Path, tmp_path: Path, capsys: Capture) -> None:
    status, output = run(files, tmp_path, line)
    (message,) = capsys.readouterr().err.splitlines()
    assert status == 2 and message.startswith("error: ") and ERRORS[line] in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epoch": 0}\n{"epoch": 1', "line 2: is not JSON"),
        ('{"loss": 1}\n', "line 1: is not the record of an epoch"),
        ("[1]\n", "line 1: is not the record of an epoch"),
        ('{"epoch": 0, "val_acc1": "high"}\n', "line 1: val_acc1 must be a number or null, got 'high'"),
        ("\n", "holds no finished epoch"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_records_that_cannot_be_used(text: str | bytes, message: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert command.main(["curves", str(file), "--output", str(tmp_path / "c.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}") and message in line


def test_outputs_that_cannot_be_written(files: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    blocked = tmp_path / "file"
    blocked.touch()
    for output, message in (
        (tmp_path / "c.jpg", "argument --output: must end in .png, .pdf, .svg"),
        (folder, "is a folder; name a file in it"),
        (blocked / "c.png", "cannot be written"),
    ):
        assert command.main(["curves", str(files / "run"), "--output", str(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_missing_matplotlib_is_reported(
    files: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, f"{visualize.__name__}.style")
    monkeypatch.delattr(visualize, "style")
    status, output = run(files, tmp_path, "states @image.png --checkpoint @fused.pth")
    assert status == 2 and not output.exists()
    assert "matplotlib, which draws the pictures, is missing: pip install matplotlib" in capsys.readouterr().err


def test_help_names_the_pictures(capsys: Capture) -> None:
    for words in (["--help"], *([name, "--help"] for name in ("states", "attention", "receptive-field", "curves"))):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 0
    assert "metrics.jsonl" in capsys.readouterr().out
