"""Mask R-CNN in mmdet: the resolved recipes, sizes, unusual training images, prediction on image files."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="the optional packages of detection are not installed")

from mmdet.evaluation import CocoMetric
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from pycocotools import mask as rle
from torch import nn

from spatial_mamba.classification.models.flops import count_parameters
from spatial_mamba.classification.models.weights import WeightsError
from spatial_mamba.detection import complexity
from spatial_mamba.detection.__main__ import main
from spatial_mamba.detection.openmmlab import data_checks, inference
from spatial_mamba.detection.openmmlab.checkpoints import fitting_weights
from spatial_mamba.detection.openmmlab.flops_table import build_model
from spatial_mamba.detection.openmmlab.tools import load_config
from spatial_mamba.kernels.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
RECIPES = {  # name: (variant, schedule)
    "mask_rcnn_spatialmamba_fpn_coco_tiny": ("tiny", "1x"),
    "mask_rcnn_spatialmamba_fpn_coco_small": ("small", "1x"),
    "mask_rcnn_spatialmamba_fpn_coco_base": ("base", "1x"),
    "mask_rcnn_spatialmamba_fpn_coco_tiny_3x": ("tiny", "3x"),
    "mask_rcnn_spatialmamba_fpn_coco_small_3x": ("small", "3x"),
}
VARIANTS = {
    "tiny": dict(dims=64, depths=(2, 4, 8, 4), drop_path_rate=0.2),
    "small": dict(dims=64, depths=(2, 4, 21, 5), drop_path_rate=0.3),
    "base": dict(dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5),
}
PUBLISHED_PARAMETERS = {"tiny": 46, "small": 63, "base": 115}  # millions
SCHEDULES = {"1x": ("1x", 12, [8, 11]), "3x": ("ms-crop-3x", 36, [27, 33])}  # mmdet's name, epochs, milestones

# The tiny recipe's detector, with few channels for tests, for two classes and images of odd sizes.
MICRO = {
    "model.backbone": dict(dims=8, depths=(1, 1, 1, 1)),
    "model.neck": dict(in_channels=[8, 16, 32, 64], out_channels=16),
    "model.rpn_head": dict(in_channels=16, feat_channels=16),
    "model.roi_head.bbox_roi_extractor.out_channels": 16,
    "model.roi_head.mask_roi_extractor.out_channels": 16,
    "model.roi_head.bbox_head": dict(in_channels=16, fc_out_channels=32, num_classes=2),
    "model.roi_head.mask_head": dict(in_channels=16, conv_out_channels=16, num_classes=2),
    "model.data_preprocessor.pad_size_divisor": 1,
    "model.test_cfg.rcnn": dict(score_thr=0.0, max_per_img=5),
    "test_dataloader.dataset.pipeline.1.scale": (101, 75),
}
META = {"classes": ("cat", "dog"), "palette": [(220, 20, 60), (0, 82, 255)]}


@pytest.fixture(scope="module")
def micro() -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config("mmdet", "mask_rcnn_spatialmamba_fpn_coco_tiny", copy.deepcopy(MICRO)))


@pytest.fixture(scope="module")
def files(micro: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a checkpoint as mmengine saves it, and two images of odd sizes in ``images``."""
    folder = tmp_path_factory.mktemp("detection")
    load_config("mmdet", "mask_rcnn_spatialmamba_fpn_coco_tiny", copy.deepcopy(MICRO)).dump(folder / "micro.py")
    torch.save({"meta": {"dataset_meta": META}, "state_dict": micro.state_dict()}, folder / "micro.pth")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (101, 101, 3), np.uint8)
    Image.fromarray(pixels[:75]).save(folder / "images" / "wide.jpg")
    Image.fromarray(pixels[:, :33]).save(folder / "images" / "tall.v2.png")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_that_of_swin_with_the_backbone_exchanged(name: str, tmp_path: Path) -> None:
    variant, schedule = RECIPES[name]
    base, epochs, milestones = SCHEDULES[schedule]
    weights = f"data/pretrained/spatialmamba_{variant}.pth"
    width = VARIANTS[variant]["dims"]
    (tmp_path / "swin.py").write_text(f'_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_{base}_coco.py"\n')
    expected = Config.fromfile(tmp_path / "swin.py").to_dict()
    expected["model"]["backbone"] = dict(type="MM_SpatialMamba", pretrained=weights, **VARIANTS[variant])
    expected["model"]["neck"]["in_channels"] = [width, 2 * width, 4 * width, 8 * width]
    expected["optim_wrapper"]["paramwise_cfg"] = {"custom_keys": {"norm": {"decay_mult": 0.0}}}
    expected["pretrained"] = weights
    expected["custom_imports"] = {"imports": ["spatial_mamba.detection"]}
    expected["custom_hooks"] = [
        {"type": f"{hook}Hook"} for hook in ("ExactResume", "StrictLoad", "SameBuffers", "Preemption")
    ]

    config = Config.fromfile(CONFIGS / f"{name}.py")
    assert config.to_dict() == expected
    assert "swin" not in config.pretty_text.lower()

    assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    warmup, decay = config.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.by_epoch, warmup.end) == ("LinearLR", 0.001, False, 1000)
    assert (decay.type, decay.milestones, decay.gamma) == ("MultiStepLR", milestones, 0.1)
    assert config.train_cfg.max_epochs == decay.end == epochs
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    kinds = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert ("RandomChoice" in kinds, "Resize" in kinds) == ((schedule == "3x"), (schedule == "1x"))


@pytest.mark.parametrize("name", RECIPES)
def test_model_of_a_recipe(name: str) -> None:
    """Parameters as published, FPN inputs as wide as the backbone's maps, drop path rising over the blocks."""
    variant, _ = RECIPES[name]
    model = build_model(load_config("mmdet", name))
    assert round(count_parameters(model) / 1e6) == PUBLISHED_PARAMETERS[variant]
    assert model.neck.in_channels == [stage["num_chs"] for stage in model.backbone.feature_info]
    rates = [b.residual_sum.drop_prob for stage in model.backbone.layers for b in stage.blocks]
    assert len(rates) == sum(VARIANTS[variant]["depths"])
    assert rates == pytest.approx(np.linspace(0, VARIANTS[variant]["drop_path_rate"], len(rates)))


def test_only_norms_have_no_weight_decay(micro: nn.Module) -> None:
    """mmengine matches names that contain norm, so ln_1 and ln_2 of the blocks do decay."""
    config = load_config("mmdet", "mask_rcnn_spatialmamba_fpn_coco_tiny")
    groups = build_optim_wrapper(micro, config.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: decays[id(p)] for name, p in micro.named_parameters()}
    assert len(decays) == len(named) and {group["lr"] for group in groups} == {1e-4}
    assert named == {name: 0.0 if "norm" in name else 0.05 for name in named}
    block = "backbone.layers.0.blocks.0"
    assert named["backbone.outnorm3.weight"] == named[f"{block}.self_attention.out_norm.bias"] == 0
    assert named[f"{block}.ln_1.weight"] == named["roi_head.mask_head.conv_logits.bias"] == 0.05


def test_complexity_command(capsys: pytest.CaptureFixture) -> None:
    """Published for the tiny detector at 1280x800: 46M parameters, 261 GFLOPs."""
    assert complexity.main(["mask_rcnn_spatialmamba_fpn_coco_tiny"]) == 0
    name, size, parameters, gflops = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, size, parameters) == ("mask_rcnn_spatialmamba_fpn_coco_tiny", "800x1280", "46,387,782")
    assert float(gflops) == pytest.approx(261, rel=0.02)


def test_complexity_knows_every_recipe() -> None:
    assert sorted(complexity.RECIPES) == sorted(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["no_such_config"], "no_such_config: no such config"), (["--size", "8", "9"], "--size")]
)
def test_complexity_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert complexity.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def sample_batch(boxes: int) -> dict[str, list]:
    """A batch of one unpadded image of 75x101 pixels, with up to two objects, as from a data loader."""
    height, width = 75, 101
    corners = torch.tensor([[3.0, 5.0, 60.0, 70.0], [40.0, 8.0, 99.0, 33.0]])[:boxes]
    masks = np.zeros((boxes, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    shape = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))
    sample = DetDataSample(metainfo={**shape, "scale_factor": (1.0, 1.0)})
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(corners), labels=torch.arange(boxes), masks=BitmapMasks(masks, height, width)
    )
    image = torch.randint(0, 256, (3, height, width), generator=torch.manual_seed(1), dtype=torch.uint8)
    return {"inputs": [image], "data_samples": [sample]}


@pytest.mark.parametrize("boxes", [0, 2], ids=["no boxes", "two boxes"])
def test_training_on_one_image_of_odd_size(micro: nn.Module, boxes: int) -> None:
    """Batch 1, unpadded; without boxes the loss is still finite and reaches the proposal network."""
    model = micro.train()
    model.zero_grad()
    batch = model.data_preprocessor(sample_batch(boxes), training=True)
    assert batch["inputs"].shape == (1, 3, 75, 101)
    loss, logged = model.parse_losses(model(**batch, mode="loss"))
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} <= logged.keys()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    reached = {name.split(".")[0] for name, gradient in gradients.items() if gradient.any()}
    assert {"backbone", "neck", "rpn_head", "roi_head"} == reached
    assert gradients["roi_head.mask_head.conv_logits.weight"].any().item() == (boxes > 0)


FURTHER = {  # one config each, small enough for tests
    "cascade_mask_rcnn_spatialmamba_fpn_coco_tiny": {
        **{key: value for key, value in MICRO.items() if key != "model.roi_head.bbox_head"},
        **{f"model.roi_head.bbox_head.{i}": MICRO["model.roi_head.bbox_head"] for i in range(3)},
    },
    "retinanet_spatialmamba_fpn_coco_tiny": {
        "model.backbone": MICRO["model.backbone"],
        "model.neck": dict(in_channels=[16, 32, 64], out_channels=16),
        "model.bbox_head": dict(in_channels=16, feat_channels=16, num_classes=2),
    },
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_detectors_learn(name: str) -> None:
    torch.manual_seed(0)
    config = load_config("mmdet", name, {**copy.deepcopy(FURTHER[name]), "optim_wrapper.optimizer.lr": 1e-3})
    model, batch = build_model(config).train(), sample_batch(boxes=2)
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    losses = [model.train_step(batch, optimizer)["loss"].item() for _ in range(10)]
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        [result] = model.eval().test_step(batch)
    assert result.pred_instances.bboxes.shape[1] == 4


def predict(files: Path, *more: str | Path) -> int:
    return main(["--config", str(files / "micro.py"), "--checkpoint", str(files / "micro.pth"), *map(str, more)])


def test_prediction_on_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder of images of odd sizes: one line each, the drawn image, and JSON with boxes and masks."""
    assert predict(files, files / "images", "--out-dir", tmp_path, "--score-threshold", 0, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(files / "images" / n) for n in ("tall.v2.png", "wide.jpg")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tall.v2.json", "tall.v2.png", "wide.json", "wide.png"]
    for name, (width, height) in (("wide", (101, 75)), ("tall.v2", (33, 101))):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert (record["width"], record["height"]) == (width, height) == Image.open(tmp_path / f"{name}.png").size
        assert Path(record["checkpoint"]).name == "micro.pth" and Path(record["config"]).name == "micro.py"
        assert len(record["detections"]) == 5
        for found in record["detections"]:
            assert META["classes"][found["label_id"]] == found["label"] and 0 < found["score"] <= 1
            left, top, right, bottom = found["box"]
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            mask = rle.decode(found["mask"])
            assert mask.shape == (height, width)
            ys, xs = np.nonzero(mask)
            # Masks are pasted into their boxes; rounding may reach a pixel beyond.
            assert not len(xs) or (left - 1 <= xs.min() and xs.max() <= right and top - 1 <= ys.min() <= bottom)
    drawn = np.asarray(Image.open(tmp_path / "wide.png").convert("RGB"), int)
    assert np.abs(drawn - np.asarray(Image.open(files / "images" / "wide.jpg"), int)).max() > 50, "nothing was drawn"


def test_prediction_rotates_images_and_scales_16_bits(files: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.full((64, 96), 100 * 257, np.uint16)
    grey[:, 48:] = 200 * 257
    Image.fromarray(grey).save(tmp_path / "scan.png", exif=exif)
    pixels = inference.read_pixels(tmp_path / "scan.png")
    assert (pixels[:48] == 100).all() and (pixels[48:] == 200).all() and pixels.shape == (96, 64, 3)
    assert predict(files, tmp_path / "scan.png", "--out-dir", tmp_path / "out", "--score-threshold", 1) == 0
    record = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert (record["width"], record["height"]) == (64, 96)
    drawn = np.asarray(Image.open(tmp_path / "out" / "scan.png").convert("RGB"))
    assert (drawn == pixels).mean() > 0.9, "the picture is drawn on the same pixels"


def test_mmdets_own_inferencer_predicts(files: Path) -> None:
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(files / "micro.py"), str(files / "micro.pth"), device="cpu", show_progress=False)
    [found] = inferencer(str(files / "images" / "wide.jpg"), pred_score_thr=0)["predictions"]
    assert len(found["bboxes"]) == len(found["labels"]) == 5


def test_prediction_without_objects(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert predict(files, files / "images" / "wide.jpg", "--out-dir", tmp_path, "--score-threshold", 1) == 0
    assert "no object with a score above 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "wide.json").read_text())["detections"] == []
    assert (tmp_path / "wide.png").is_file()


def test_class_names_are_in_the_order_of_the_metrics_file(tmp_path: Path) -> None:
    """Its numbers of categories may differ from those of the data set's file."""
    categories = [dict(id=i, name=name) for i, name in enumerate("xyz")]
    (tmp_path / "a.json").write_text(json.dumps(dict(images=[], annotations=[], categories=categories)))
    dataset, metric = SimpleNamespace(cat_ids=[1, 2, 3]), CocoMetric(str(tmp_path / "a.json"))
    data_checks._check_names(dataset, ["x", "y", "z"], "the data set", [metric])
    with pytest.raises(UserError, match=r"the data set: .* in the order of its annotation file: \['x', 'y', 'z'\]"):
        data_checks._check_names(dataset, ["y", "x", "z"], "the data set", [metric])


def test_weights_for_other_classes_name_the_remedy(micro: nn.Module, files: Path) -> None:
    classes = {"model.roi_head.bbox_head.num_classes": 5, "model.roi_head.mask_head.num_classes": 5}
    pretrained = {"model.backbone.pretrained": str(files / "micro.pth")}
    config = load_config("mmdet", str(files / "micro.py"), classes | pretrained)
    model = build_model(config)
    message = r"micro\.pth: does not fit this model in 6 entries: roi_head\.bbox_head\.fc_cls\.bias is \(3,\).* "
    message += r"set num_classes of the heads .* or start from its backbone alone with model\.backbone\.pretrained=FILE"
    checkpoint = {"state_dict": micro.state_dict()}
    with pytest.raises(WeightsError, match=message):
        fitting_weights(model, checkpoint, "micro.pth")
    with pytest.raises(WeightsError, match=message):
        inference.load_weights(model, checkpoint, Path("micro.pth"), config)
    model.init_weights()  # the remedy
    weights = [m.backbone.layers[3].blocks[0].mlp.fc1.weight for m in (model, micro)]
    assert weights[0].equal(weights[1])
    config.model.backbone.update(in_chans=1)
    with pytest.raises(WeightsError, match=r"micro\.pth: holds another model, .* 1 channels; .* with in_chans=3$"):
        fitting_weights(build_model(config), checkpoint, "micro.pth")


def _break(files: Path, tmp_path: Path) -> dict[str, tuple[list[Any], str]]:
    """Wrong inputs: arguments, and the words of the error."""
    images = files / "images"
    wide = images / "wide.jpg"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "torn.jpg").write_bytes(wide.read_bytes()[:-2000])
    Image.fromarray(np.ones((64, 64), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "wide.png").write_bytes((images / "tall.v2.png").read_bytes())
    checkpoint = torch.load(files / "micro.pth", weights_only=True)
    renamed = {name.replace("outnorm3", "norm3"): tensor for name, tensor in checkpoint["state_dict"].items()}
    torch.save({"state_dict": renamed}, tmp_path / "renamed.pth")
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "nameless.pth")
    torch.save({**checkpoint, "meta": {"pattern": re.compile("x")}}, tmp_path / "foreign.pth")
    load_config("mmdet", str(files / "micro.py"), {"model.neck.type": "FFPN"}).dump(tmp_path / "typo.py")
    return {
        "missing image": ([images / "none.jpg"], "none.jpg: no such image"),
        "missing next to a good one": ([wide, images / "none.jpg"], "none.jpg: no such image"),
        "empty folder": ([tmp_path / "empty"], "empty: no images"),
        "no image": ([tmp_path / "text.png"], "text.png: cannot be read"),
        "torn image": ([tmp_path / "torn.jpg"], "torn.jpg: cannot be read"),
        "floating-point image": ([tmp_path / "float.tif"], "float.tif: cannot be read as an image (floating-point"),
        "two of one name": ([wide, tmp_path / "wide.png"], "would both be written to"),
        "image as output": ([tmp_path / "wide.png", "--out-dir", tmp_path], "would be overwritten"),
        "file as folder": ([wide, "--out-dir", tmp_path / "text.png"], "text.png is not a folder"),
        "missing config": ([wide, "--config", "nothing"], "nothing: no such config"),
        "config of another task": (
            [wide, "--config", CONFIGS.parent / "segmentation/upernet_spatialmamba_digits.py"],
            "is a config for mmseg",
        ),
        "unknown type": ([wide, "--config", tmp_path / "typo.py"], "FFPN is not in the mmdet::model registry; did you"),
        "missing checkpoint": ([wide, "--checkpoint", tmp_path / "no.pth"], "no.pth: no such checkpoint"),
        "checkpoint that does not fit": (
            [wide, "--checkpoint", tmp_path / "renamed.pth"],
            "does not fit this model in 4 entries: backbone.norm3.bias is not part of the model",
        ),
        "foreign type": (
            [wide, "--checkpoint", tmp_path / "foreign.pth"],
            "foreign.pth: refused, because it asks to load re",
        ),
        "classes that do not fit": ([wide, "--checkpoint", tmp_path / "nameless.pth"], "names 80 classes, but"),
        "threshold": ([wide, "--score-threshold", "1.5"], "--score-threshold: must be in [0, 1]"),
        "option": ([wide, "--no-such-option"], "--no-such-option"),
        "device": ([wide, "--device", "cuda"], "PyTorch finds no usable GPU"),
    }


def test_wrong_input_is_named_in_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for case, (arguments, message) in _break(files, tmp_path).items():
        if case == "device" and torch.cuda.is_available():
            continue
        out_dir = [] if "--out-dir" in arguments else ["--out-dir", tmp_path / "out"]
        assert predict(files, *out_dir, *arguments) == 2, case
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, f"{case}: {error}"
        assert not (tmp_path / "out").exists(), case
