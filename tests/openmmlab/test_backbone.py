"""The backbone under its registered name: initial weights, options, frozen stages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

import mmdet.registry
import mmseg.registry
from mmengine.registry import MODELS, DefaultScope

import spatial_mamba.detection  # noqa: F401, registers the backbone
from spatial_mamba import SpatialMambaBackbone
from spatial_mamba.classification.models.spatial_mamba import SpatialMamba
from spatial_mamba.classification.models.weights import WeightsError

SMALL = dict(dims=8, depths=(1, 2, 1, 1), drop_path_rate=0.0)


def build(**options: object) -> nn.Module:
    return MODELS.build(dict(type="MM_SpatialMamba", **SMALL, **options))


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_the_backbone_is_found_from_every_scope(scope: str) -> None:
    registry = {"mmengine": MODELS, "mmdet": mmdet.registry.MODELS, "mmseg": mmseg.registry.MODELS}[scope]
    with DefaultScope.overwrite_default_scope(scope):
        model = registry.build(dict(type="MM_SpatialMamba", **SMALL, out_indices=(1, 3)))
    maps = model(torch.randn(1, 3, 75, 101))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 10, 13), (1, 64, 3, 4)]


def test_it_matches_the_backbone_of_the_library() -> None:
    own, model = SpatialMambaBackbone(**SMALL).eval(), build().eval()
    model.load_state_dict(own.state_dict())
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(own(image), model(image), strict=True))


@pytest.mark.parametrize("how", ["pretrained", "init_cfg", "inside a detector"])
def test_training_starts_from_a_classification_checkpoint(tmp_path: Path, how: str) -> None:
    classifier = SpatialMamba(num_classes=7, **SMALL)
    path = tmp_path / "classifier.pth"
    torch.save({"model": classifier.state_dict(), "epoch": 3, "max_accuracy": np.float64(81.2)}, path)
    if how == "inside a detector":
        with DefaultScope.overwrite_default_scope("mmdet"):
            detector = MODELS.build(
                dict(
                    type="mmdet.RetinaNet",
                    backbone=dict(type="MM_SpatialMamba", **SMALL, pretrained=str(path)),
                    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
                    bbox_head=dict(type="RetinaHead", num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1),
                )
            )
        detector.init_weights()
        model = detector.backbone
    else:
        options = {"pretrained": path} if how == "pretrained" else {"init_cfg": init_cfg(path)}
        model = build(**options)
        model.init_weights()
    expected, state = classifier.state_dict(), model.state_dict()
    taken = [name for name in state if not name.startswith("outnorm")]
    assert set(expected) - set(taken) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert all(torch.equal(state[name], expected[name]) for name in taken)
    assert all((state[f"outnorm{i}.weight"] == 1).all() for i in range(4))


@pytest.mark.parametrize("options", [dict(pretrained=""), dict(pretrained=None), dict(init_cfg=None)], ids=str)
def test_empty_names_of_weights_mean_none(options: dict) -> None:
    model = build(**options)
    before = model.state_dict()["patch_embed.conv1.conv.weight"].clone()
    model.init_weights()
    assert torch.equal(model.state_dict()["patch_embed.conv1.conv.weight"], before)


@pytest.mark.parametrize("prefix", ["student.backbone", "student.backbone."])
def test_weights_under_a_prefix_are_found(tmp_path: Path, prefix: str) -> None:
    state = SpatialMambaBackbone(**SMALL).state_dict()
    named = {f"student.backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**named, "teacher.weight": torch.ones(1)}}, tmp_path / "a.pth")
    entry = dict(init_cfg(tmp_path / "a.pth"), prefix=prefix, map_location="cpu")
    model = build(init_cfg=[entry])
    model.init_weights()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"a\.pth: holds no weights whose names start with other\."):
        build(init_cfg=dict(entry, prefix="other")).init_weights()
    torch.save({**named, **{f"teacher.backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
    build(init_cfg=entry).init_weights()
    with pytest.raises(WeightsError, match=r"several models, named student\.backbone\.\* and teacher\.backbone\.\*"):
        build(pretrained=tmp_path / "a.pth").init_weights()


def test_a_backbone_of_other_channels_starts_from_rgb_weights(tmp_path: Path) -> None:
    weight = torch.arange(4 * 3 * 9.0).view(4, 3, 3, 3)
    state = SpatialMamba(num_classes=7, **SMALL).state_dict() | {"patch_embed.conv1.conv.weight": weight}
    torch.save({"module." + name: tensor for name, tensor in state.items()}, tmp_path / "a.pth")
    model = build(in_chans=1, init_cfg=init_cfg(tmp_path / "a.pth"))
    model.init_weights()
    assert model.patch_embed.conv1.conv.weight.equal(weight.sum(1, keepdim=True))


def test_a_url_is_shown_in_full() -> None:
    with pytest.raises(WeightsError, match=r"^https://host/tiny\.pth: is a URL; download the file"):
        build(pretrained="https://host/tiny.pth").init_weights()


def init_cfg(path: object) -> dict:
    return dict(type="Pretrained", checkpoint=str(path))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: no such checkpoint"):
        build(pretrained=tmp_path / "absent.pth").init_weights()
    state = SpatialMamba(num_classes=7, **SMALL).state_dict()
    for change, message in (
        ({"layers.0.blocks.0.ln_1.weight": None}, r"does not fit this model in 1 entries: layers\.0.*is missing"),
        ({"layers.9.weight": torch.ones(1)}, r"layers\.9\.weight is not part of the model"),
        ({"patch_embed.conv1.conv.weight": torch.ones(1)}, r"conv1\.conv\.weight is \(1,\), but the model has"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        torch.save({"model": changed}, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            build(pretrained=tmp_path / "other.pth").init_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pretrained="a.pth", init_cfg=init_cfg("b.pth")), "give one of them"),
        (dict(init_cfg=dict(type="Kaiming", layer="Conv2d")), "init_cfg must be"),
        (dict(init_cfg=[init_cfg("a.pth"), dict(type="Kaiming", layer="Conv2d")]), "init_cfg must be .* a list of one"),
        (dict(init_cfg=init_cfg("")), "init_cfg must be"),
        (
            dict(embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, convert_weights=True),  # Swin's
            "no option convert_weights, embed_dims, num_heads, window_size; .* removed by _delete_=True",
        ),
        (dict(frozen_stages=5), r"-1 \(none\) to 4"),
        (dict(out_indices=(0, 7)), "out_indices must be"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages_are_neither_trained_nor_in_training_mode(frozen: int) -> None:
    model = build(frozen_stages=frozen, out_indices=(1, 3)).train()
    frozen_names = ["patch_embed."] * (frozen >= 0) + [f"layers.{i}." for i in range(frozen)]
    frozen_names += [f"outnorm{i}." for i in (1, 3) if i < frozen]
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    maps = model(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(m.square().sum() for m in maps).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(tuple(frozen_names))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(tuple(frozen_names)), name


def test_norm_eval_keeps_the_statistics_and_trains_the_weights() -> None:
    model = build(norm_eval=True).train()
    assert len(batch_norms(model)) == 8
    assert not any(norm.training for norm in batch_norms(model))
    assert model.training
    assert model.layers[0].blocks[0].training
    before = [norm.running_mean.clone() for norm in batch_norms(model)]
    sum(m.square().sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    for norm, mean in zip(batch_norms(model), before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad.abs().sum() > 0


def test_with_cp_changes_no_result() -> None:
    plain, recomputing = build().train(), build(with_cp=True).train()
    recomputing.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (plain, recomputing):
        maps = model(image)
        sum(m.square().sum() for m in maps).backward()
        outputs.append([*maps, *(p.grad for p in model.parameters())])
    for expected, got in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected)
