"""UPerNet in mmseg: the resolved recipes, sizes, unusual training images, prediction on image files."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="the optional packages of segmentation are not installed")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import nn

from spatial_mamba.classification.models.flops import count_parameters
from spatial_mamba.detection.openmmlab import data_checks, flops_table, tools
from spatial_mamba.detection.openmmlab.flops_table import build_model
from spatial_mamba.detection.openmmlab.tools import _keep_total_batch, _move_data, load_config
from spatial_mamba.kernels.errors import UserError
from spatial_mamba.segmentation import complexity
from spatial_mamba.segmentation.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs" / "segmentation"
RECIPE = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_{}"
BASE = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
VARIANTS = {
    "tiny": dict(dims=64, depths=(2, 4, 8, 4), drop_path_rate=0.2),
    "small": dict(dims=64, depths=(2, 4, 21, 5), drop_path_rate=0.3),
    "base": dict(dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5),
}
PUBLISHED_PARAMETERS = {"tiny": 57, "small": 73, "base": 127}  # millions

# The tiny recipe's segmentor, with few channels for tests, for images of an odd size.
SIZE = (75, 101)
MICRO = {
    "model.backbone": dict(dims=8, depths=(1, 1, 1, 1)),
    "model.decode_head": dict(in_channels=[8, 16, 32, 64], channels=16),
    "model.auxiliary_head": dict(in_channels=32, channels=16),
    "model.data_preprocessor.size": SIZE,
    "test_dataloader.dataset.pipeline.1.scale": SIZE[::-1],
}


@pytest.fixture(scope="module")
def micro() -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config("mmseg", RECIPE.format("tiny"), copy.deepcopy(MICRO)))


@pytest.fixture(scope="module")
def files(micro: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a checkpoint as mmengine saves it but without class names, and an image."""
    folder = tmp_path_factory.mktemp("segmentation")
    load_config("mmseg", RECIPE.format("tiny"), copy.deepcopy(MICRO)).dump(folder / "micro.py")
    torch.save({"meta": {"epoch": 1}, "state_dict": micro.state_dict()}, folder / "micro.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "scene.png")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_recipe_is_that_of_swin_with_the_backbone_exchanged(variant: str, tmp_path: Path) -> None:
    weights = f"data/pretrained/spatialmamba_{variant}.pth"
    width = VARIANTS[variant]["dims"]
    (tmp_path / "swin.py").write_text(f'_base_ = "{BASE}"\n')
    expected = Config.fromfile(tmp_path / "swin.py").to_dict()
    expected["model"]["backbone"] = dict(type="MM_SpatialMamba", pretrained=weights, **VARIANTS[variant])
    expected["model"]["decode_head"]["in_channels"] = [width, 2 * width, 4 * width, 8 * width]
    expected["model"]["auxiliary_head"]["in_channels"] = 4 * width
    expected["optim_wrapper"]["paramwise_cfg"] = {"custom_keys": {"norm": {"decay_mult": 0.0}}}
    expected["train_dataloader"]["batch_size"] = 4  # on 4 GPUs, for 2 on 8
    expected["auto_scale_lr"] = {"enable": False, "base_batch_size": 16}
    expected["total_batch"] = {"images": 16, "processes": 4}
    expected["img_ratios"] = [0.75, 1.0, 1.25]
    sizes = [(1536, 384), (2048, 512), (2560, 640)]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)]
    transforms = [[{"type": "Resize", "scale": size, "keep_ratio": True} for size in sizes], flips]
    transforms += [[{"type": "LoadAnnotations"}], [{"type": "PackSegInputs"}]]
    expected["tta_pipeline"] = [  # the published multi-scale test
        {"type": "LoadImageFromFile", "backend_args": None},
        {"type": "TestTimeAug", "transforms": transforms},
    ]
    expected["checkpoint_file"], expected["backbone_norm_cfg"] = weights, None
    expected["custom_imports"] = {"imports": ["spatial_mamba.segmentation"]}
    expected["custom_hooks"] = [
        {"type": f"{hook}Hook"} for hook in ("ExactResume", "StrictLoad", "SameBuffers", "Preemption")
    ]

    config = Config.fromfile(CONFIGS / f"{RECIPE.format(variant)}.py")
    assert config.to_dict() == expected
    assert not [word for word in ("swin", "window") if word in config.pretty_text.lower()]

    assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    warmup, decay = config.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.begin, warmup.end) == ("LinearLR", 1e-6, 0, 1500)
    assert (decay.type, decay.power, decay.eta_min, decay.begin, decay.end) == ("PolyLR", 1.0, 0.0, 1500, 160_000)
    assert config.train_cfg.max_iters == 160_000
    assert config.model.data_preprocessor["size"] == config.crop_size == (512, 512)


@pytest.mark.parametrize(("processes", "images"), [(1, 16), (4, 4), (8, 2), (16, 1)])
def test_processes_share_the_total_batch(processes: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(tools, "print_log", lambda line, logger: said.append(line))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = load_config("mmseg", RECIPE.format("tiny"), {"launcher": "pytorch"})
    _keep_total_batch(config)
    assert config.train_dataloader.batch_size == images
    assert said == [f"total batch 16: {processes} processes with {images} images each"]


def test_a_total_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"^6 processes cannot share the 16 images .* start 1, 2, 4, 8, 16 processes"):
        _keep_total_batch(load_config("mmseg", RECIPE.format("tiny"), {"launcher": "pytorch"}))


@pytest.mark.parametrize(
    ("options", "images"),
    [({}, 16), ({"launcher": "slurm"}, 2), ({"launcher": "mpi"}, 8), ({"train_dataloader.batch_size": 3}, 3)],
)
def test_processes_are_those_of_the_launcher(options: dict, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of Slurm around a single process are ignored; a batch size set by the user is kept."""
    monkeypatch.setattr(tools, "print_log", lambda line, logger: None)
    for name, value in (("WORLD_SIZE", "4"), ("SLURM_NTASKS", "8"), ("OMPI_COMM_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    config = load_config("mmseg", RECIPE.format("tiny"), options)
    _keep_total_batch(config)
    assert config.train_dataloader.batch_size == images


def test_the_data_set_may_be_elsewhere() -> None:
    config = load_config("mmseg", RECIPE.format("tiny"))
    _move_data(config, "/data/ade20k")
    roots = [config.data_root, *(config[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test"))]
    assert roots == ["/data/ade20k"] * 4
    detector = load_config("mmdet", "mask_rcnn_spatialmamba_fpn_coco_tiny")
    _move_data(detector, "/data/coco/")
    assert detector.test_evaluator.ann_file == "/data/coco/annotations/instances_val2017.json"
    nested = Config(
        dict(data_root="data", train_dataloader=dict(dataset=dict(a=({"data_root": "data/"},), data_root=None)))
    )
    _move_data(nested, "s3://bucket/coco")
    assert nested.train_dataloader.dataset == dict(a=({"data_root": "s3://bucket/coco"},), data_root=None)
    assert detector.model.backbone.pretrained == "data/pretrained/spatialmamba_tiny.pth"


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_of_a_recipe(variant: str) -> None:
    """Parameters as published, head inputs as wide as the backbone's maps, drop path rising over the blocks."""
    model = build_model(load_config("mmseg", RECIPE.format(variant)))
    assert round(count_parameters(model) / 1e6) == PUBLISHED_PARAMETERS[variant]
    widths = [stage["num_chs"] for stage in model.backbone.feature_info]
    assert model.decode_head.in_channels == widths and model.auxiliary_head.in_channels == widths[2]
    rates = [b.residual_sum.drop_prob for stage in model.backbone.layers for b in stage.blocks]
    assert len(rates) == sum(VARIANTS[variant]["depths"])
    assert rates == pytest.approx(np.linspace(0, VARIANTS[variant]["drop_path_rate"], len(rates)))


def test_only_norms_have_no_weight_decay(micro: nn.Module) -> None:
    """mmengine matches names that contain norm, so the BatchNorms of the heads, called bn, do decay."""
    config = load_config("mmseg", RECIPE.format("tiny"))
    groups = build_optim_wrapper(micro, config.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: decays[id(p)] for name, p in micro.named_parameters()}
    assert len(decays) == len(named) and {group["lr"] for group in groups} == {6e-5}
    assert named == {name: 0.0 if "norm" in name else 0.01 for name in named}
    assert named["backbone.outnorm3.weight"] == 0 and named["decode_head.bottleneck.bn.weight"] == 0.01


def test_label_maps_are_checked_at_their_own_size(
    micro: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation resizes images, but not label maps. Labels that a head ignores are right."""
    for kind, name, size, value in (
        ("images", "a.jpg", (40, 30), 0),
        ("images", "b.jpg", (9, 9), 0),
        ("annotations", "a.png", (40, 30), 255),
        ("annotations", "b.png", (9, 8), 1),
    ):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.new("L", size, value).save(tmp_path / kind / name)
    config = load_config("mmseg", RECIPE.format("tiny")).val_dataloader.dataset
    prefix = dict(img_path="images", seg_map_path="annotations")
    dataset = DATASETS.build({**config, "data_root": str(tmp_path), "data_prefix": prefix})
    monkeypatch.setattr(micro.decode_head, "ignore_index", 200)
    data_checks._check_loading(dataset, 150, micro)
    assert dataset[0]["inputs"].shape != (3, 30, 40)
    with pytest.raises(UserError, match=r"b\.png: has shape \(8, 9\), but its image has \(9, 9\)"):
        dataset[1]
    Image.new("L", (40, 30), 201).save(tmp_path / "annotations/a.png")  # less 1 by reduce_zero_label
    assert dataset[0]
    Image.new("L", (40, 30), 151).save(tmp_path / "annotations/a.png")
    with pytest.raises(UserError, match=r"a\.png: has the label 150 \(after .*\), but .* 150 classes; .* or 255"):
        dataset[0]


def test_heads_of_other_classes_do_not_count(micro: nn.Module) -> None:
    heads = {"model.decode_head": 150, "model.auxiliary_head": 150}
    assert data_checks.head_classes(micro) == heads
    data_checks._check_heads(micro, 150, "the data set")
    with pytest.raises(UserError, match=r"the data set has 11 classes, but model\.decode_head\.num_classes is 150, "):
        data_checks._check_heads(micro, 11, "the data set")
    binary = MODELS.build(dict(type="FCNHead", in_channels=8, channels=8, num_classes=2, out_channels=1, threshold=0.3))
    edges = MODELS.build(dict(type="STDCHead", in_channels=8, channels=8, num_classes=2, boundary_threshold=0.1))
    assert data_checks.head_classes(nn.ModuleDict(dict(a=binary, b=edges))) == {}


def test_complexity_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published for the tiny segmentor at 512x2048: 57M parameters, 936 GFLOPs.

    FLOPs are all but proportional to the pixels, so the test counts those of a 16th of the image.
    """
    count = flops_table.count_model_flops
    monkeypatch.setattr(
        flops_table, "count_model_flops", lambda model, size: 16 * count(model, (size[0] // 4, size[1] // 4))
    )
    assert complexity.main([RECIPE.format("tiny")]) == 0
    name, size, parameters, gflops = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, size, parameters) == (RECIPE.format("tiny"), "512x2048", "56,544,386")
    assert float(gflops) == pytest.approx(936, rel=0.02)


def test_complexity_knows_every_recipe() -> None:
    assert [RECIPE.format(variant) for variant in VARIANTS] == complexity.RECIPES


@pytest.mark.parametrize("ignored", [True, False], ids=["all ignored", "labelled"])
def test_training_on_images_of_odd_size(micro: nn.Module, ignored: bool) -> None:
    """If no pixel has a label, the loss and its gradients are 0."""
    generator = torch.manual_seed(1)
    samples = []
    for _ in range(2):
        labels = torch.randint(0, 150, (1, *SIZE), generator=generator)
        sample = SegDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE))
        sample.gt_sem_seg = PixelData(data=torch.full_like(labels, 255) if ignored else labels)
        samples.append(sample)
    images = [torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8) for _ in samples]

    model = micro.train()
    model.zero_grad()
    batch = model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)
    assert batch["inputs"].shape == (2, 3, *SIZE)
    loss, logged = model.parse_losses(model(**batch, mode="loss"))
    loss.backward()
    assert torch.isfinite(loss) and (loss == 0 if ignored else loss > 1)
    assert {"decode.loss_ce", "aux.loss_ce"} <= logged.keys()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert model.backbone.layers[0].blocks[0].ln_1.weight.grad.any().item() == (not ignored)


def predict(files: Path, *more: str | Path) -> int:
    return main(["--config", str(files / "micro.py"), "--checkpoint", str(files / "micro.pth"), *map(str, more)])


def test_prediction_on_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One image of odd size: one line, the drawn image, the label map, and JSON, all of the same pixels."""
    assert predict(files, files / "scene.png", "--out-dir", tmp_path, "--device", "cpu") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.json", "scene.png", "scene_labels.png"]
    record = json.loads((tmp_path / "scene.json").read_text())
    assert (record["height"], record["width"]) == SIZE
    labels = np.asarray(Image.open(tmp_path / "scene_labels.png"))
    assert labels.shape == SIZE and labels.dtype == np.uint8
    names = ADE20KDataset.METAINFO["classes"]  # the config's, because the checkpoint has none
    counted = {entry["label_id"]: entry["pixels"] for entry in record["classes"]}
    assert counted == {label: (labels == label).sum() for label in np.unique(labels)}
    for entry in record["classes"]:
        assert entry["label"] == names[entry["label_id"]]
        assert entry["share"] == pytest.approx(entry["pixels"] / labels.size, abs=1e-6)
    largest = record["classes"][0]
    assert largest["pixels"] == max(counted.values()) and f"scene.png: {largest['label']} " in line

    drawn = np.asarray(Image.open(tmp_path / "scene.png").convert("RGB"), int)
    half = np.asarray(Image.open(files / "scene.png"), int) // 2
    colour = np.array(ADE20KDataset.METAINFO["palette"][largest["label_id"]]) // 2
    assert drawn.shape == (*SIZE, 3)
    # Half image, half colour of the class; names are written over some of it.
    overlay = np.abs(drawn - half - colour).max(-1) <= 1
    assert overlay[labels == largest["label_id"]].mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{files}/scene.png", "{files}/scene_labels.png"], "would both be written to"),
        (["{files}/scene.png", "--config", "{configs}/detection/mask_rcnn_spatialmamba_fpn_digits.py"], "for mmdet"),
        (["{files}/scene.png", "--checkpoint", "{files}/other.pth"], "does not fit this model in 4 entries"),
        (["{files}/none.png"], "none.png: no such image"),
    ],
)
def test_wrong_input_is_named_in_one_line(
    files: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The tests of detection cover the checks that both tasks share; this covers the others."""
    state = torch.load(files / "micro.pth", weights_only=True)["state_dict"]
    renamed = {name.replace("outnorm3", "norm3"): tensor for name, tensor in state.items()}
    torch.save({"state_dict": renamed}, files / "other.pth")
    Image.open(files / "scene.png").save(files / "scene_labels.png")
    filled = [argument.format(files=files, configs=CONFIGS.parent) for argument in arguments]
    assert predict(files, "--out-dir", tmp_path / "out", *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()
