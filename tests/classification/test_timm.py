"""The models in timm: registration, metadata, features, layer groups, timm's own scripts."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from spatial_mamba.classification.models.trained import load_classifier
from spatial_mamba.classification.models.weights import WeightsError

from .micro_models import MICRO, PARAMETERS, filled_classifier, images, micro_backbone, micro_classifier


def test_timm_lists_the_models() -> None:
    assert timm.list_models("spatial_mamba*") == [f"spatial_mamba_{v}" for v in ("base", "small", "tiny")]


@pytest.fixture(scope="module")
def gray_tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("spatial_mamba_tiny", num_classes=10, in_chans=1).eval()


@torch.no_grad()
def test_timm_feature_and_head_interface(gray_tiny: nn.Module) -> None:
    x = images(2, 1, 64, 96)
    tokens = gray_tiny.forward_features(x)
    assert tokens.shape == (2, 2, 3, gray_tiny.num_features)
    features = gray_tiny.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, gray_tiny.head_hidden_size)
    torch.testing.assert_close(features, tokens.mean(dim=(1, 2)))
    logits = gray_tiny.forward_head(tokens)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, gray_tiny.get_classifier()(features))
    torch.testing.assert_close(gray_tiny(x), logits)


def test_timm_metadata(gray_tiny: nn.Module) -> None:
    cfg = gray_tiny.pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["interpolation"] == "bicubic"
    assert cfg["input_size"] == (3, 224, 224)
    assert gray_tiny.get_submodule(cfg["classifier"]) is gray_tiny.get_classifier()
    assert gray_tiny.get_submodule(cfg["first_conv"]).in_channels == 1
    assert gray_tiny.no_weight_decay() == set()
    assert [info["num_chs"] for info in gray_tiny.feature_info] == [64, 128, 256, 512]


@torch.no_grad()
def test_reset_classifier() -> None:
    model = filled_classifier().double().eval()
    x = images(2, 3, 32, 64).double()
    tokens = model.forward_features(x)

    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), tokens.mean(dim=(1, 2)))

    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model(x).shape == (2, 7)

    model.reset_classifier(7, global_pool="")
    torch.testing.assert_close(model(x), model.get_classifier()(tokens))
    model.reset_classifier(0, global_pool="")
    torch.testing.assert_close(model(x), tokens)
    with pytest.raises(ValueError, match=r"global_pool .*'max'"):
        model.reset_classifier(7, global_pool="max")


def test_timm_pretrained_is_an_error_while_no_weights_are_hosted() -> None:
    with pytest.raises(RuntimeError, match="spatial_mamba_tiny"):
        timm.create_model("spatial_mamba_tiny", pretrained=True)


@pytest.mark.parametrize("use", [dict(num_classes=9), dict(features_only=True)], ids=str)
def test_a_new_classifier_does_not_hide_that_weights_do_not_fit(use: dict[str, Any], tmp_path: Path) -> None:
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    incomplete = micro_classifier().state_dict()
    del incomplete["layers.1.blocks.0.mlp.fc1.weight"]
    for state, message in (
        (micro_classifier(depths=(1, 1, 2, 1)).state_dict(), r"holds another model.* with depths=\(1, 1, 2, 1\)"),
        (incomplete, r"1 entries: layers\.1\.blocks\.0\.mlp\.fc1\.weight is missing"),
        (nn.Linear(2, 2).state_dict(), "does not fit this model"),
    ):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=message):
            timm.create_model("spatial_mamba_tiny", **MICRO | source | use)
    torch.save(micro_backbone().state_dict(), tmp_path / "w.pth")
    timm.create_model("spatial_mamba_tiny", **MICRO | source | use | dict(in_chans=4))


@torch.no_grad()
def test_forward_intermediates_are_the_features_before_downsampling() -> None:
    model, x = filled_classifier().eval(), images(2, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 8 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    torch.testing.assert_close(model.norm(maps[3].permute(0, 2, 3, 1)), final)

    last, chosen = model.forward_intermediates(x, indices=[-2, 1], norm=True, stop_early=True, output_fmt="NHWC")
    torch.testing.assert_close(chosen, [m.permute(0, 2, 3, 1) for m in maps[1:3]])
    torch.testing.assert_close(last, chosen[-1])
    [normed] = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(normed, final)
    with pytest.raises(ValueError, match=r"output_fmt .* 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_features_only_gives_the_requested_maps_of_a_file(tmp_path: Path) -> None:
    x, classifier = images(1, 3, 64, 64), filled_classifier().eval()
    expected = classifier.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    options = MICRO | source | dict(num_classes=5, features_only=True, out_indices=(0, 2))
    features = timm.create_model("spatial_mamba_tiny", **options).eval()
    assert features.feature_info.channels() == [8, 32]
    assert features.feature_info.reduction() == [4, 16]
    assert not any("layers.3" in name or "head" in name for name, _ in features.named_parameters())
    torch.testing.assert_close(features(x), expected)


@pytest.mark.parametrize("kind", ["fx", "hook", "list"])
def test_features_have_one_extractor(kind: str) -> None:
    with pytest.raises(ValueError, match="feature_cls must be 'getter'"):
        timm.create_model("spatial_mamba_tiny", dims=16, depths=(1, 1), features_only=True, feature_cls=kind)


def test_layer_groups_run_from_the_stem_to_the_head() -> None:
    model = micro_classifier(depths=(1, 2))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    names = [
        "patch_embed.conv1.conv.weight",
        *(f"layers.{b}.ln_1.weight" for b in ("0.blocks.0", "1.blocks.0", "1.blocks.1")),
    ]
    assert [layers[name] for name in [*names, "head.weight"]] == [0, 1, 2, 3, 4]
    assert layers["layers.0.downsample.conv.0.conv.weight"] == 1
    assert layers["norm.weight"] == 3
    stages = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(stages.values())) == [0, 1, 2, 3]
    backbone = micro_backbone(depths=(1, 1), out_indices=(0, 1))
    layers = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    assert (layers["outnorm0.weight"], layers["outnorm1.weight"]) == (1, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_timm_makes_models_on_a_device_in_a_dtype(device: str) -> None:
    model = timm.create_model("spatial_mamba_tiny", **MICRO, device=device, dtype=torch.bfloat16)
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {t.device.type for t in tensors} == {device}
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    x = images(1, 3, 32, 32).to(device, torch.bfloat16)
    assert model.eval()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", PARAMETERS)
def test_metadata_names_the_published_accuracy(variant: str) -> None:
    cfg = timm.get_pretrained_cfg(f"spatial_mamba_{variant}")
    assert f"published_top1={ {'tiny': 83.5, 'small': 84.6, 'base': 85.3}[variant] }" in cfg.notes
    assert (cfg.crop_pct, cfg.interpolation, cfg.license) == (0.875, "bicubic", "apache-2.0")


def test_timms_training_and_validation_scripts_take_the_model(tmp_path: Path) -> None:
    """The calls that timm's train.py and validate.py make, in the same order."""
    options = dict(num_classes=4, in_chans=3, drop_rate=0.0, drop_path_rate=0.1, global_pool=None, bn_momentum=None)
    model = timm.create_model("spatial_mamba_tiny", pretrained=False, **MICRO | options, checkpoint_path="")
    model.set_grad_checkpointing(enable=True)
    data = timm.data.resolve_data_config({"img_size": 32}, model=model)
    assert (data["input_size"], data["crop_pct"], data["mean"]) == ((3, 32, 32), 0.875, (0.485, 0.456, 0.406))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == [0.5**n for n in range(5, -1, -1)]  # the stem, four blocks, the head
    ema = ModelEmaV3(model, decay=0.5)
    args = argparse.Namespace(model="spatial_mamba_tiny", lr=1e-2)  # saved with the weights
    saver = timm.utils.CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    x, target = images(4, 3, 32, 32), torch.arange(4)
    losses = []
    for epoch in range(3):
        loss = F.cross_entropy(model.train()(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses.append(loss.item())
        saver.save_checkpoint(epoch, metric=-loss.item())
    assert losses[-1] < losses[0]
    best = tmp_path / "model_best.pth.tar"
    validated = timm.create_model("spatial_mamba_tiny", **MICRO | options, checkpoint_path=best)  # the EMA
    with torch.no_grad():
        torch.testing.assert_close(validated.eval()(x), ema.module.eval()(x))
    for take_ema, expected in ((False, model), (True, ema.module)):
        loaded = load_classifier(best, ema=take_ema).model
        assert all(map(torch.equal, loaded.state_dict().values(), expected.state_dict().values()))
