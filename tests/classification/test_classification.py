"""The ImageNet trainer: recipe, data, training, resuming, checkpoints, evaluation, and every way to use it wrongly."""

import fcntl
import functools
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from spatial_mamba import SpatialMamba
from spatial_mamba.classification import complexity, engine, optim, trainer
from spatial_mamba.classification.checkpoint import BEST, BEST_EMA, LATEST, save_checkpoint
from spatial_mamba.classification.config import CONFIG_FOLDER, leaves, load_config
from spatial_mamba.classification.data import (
    EvalSampler,
    ImageData,
    TrainSampler,
    build_mixup,
    build_train_loader,
    build_transform,
    build_val_loader,
    check_classes,
)
from spatial_mamba.classification.digits import write_digits
from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.errors import InputError
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.architecture import architecture_of
from spatial_mamba.classification.models.image_files import ImageFileError, find_images, read_image
from spatial_mamba.classification.models.weights import read_checkpoint
from spatial_mamba.classification.optim import autocast_dtype, build_criterion, build_optimizer, build_scheduler
from spatial_mamba.classification.readers import CachedReader, open_split
from spatial_mamba.classification.seeding import seed_everything
from spatial_mamba.classification.trainer import build_model, prepare

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "classification" / "main.py"
CPU = Process(0, 1, torch.device("cpu"))

# A model and a recipe as small as they come, with every part of the recipe switched on.
MICRO = {
    "DATA": {"IMG_SIZE": 32, "BATCH_SIZE": 4, "NUM_WORKERS": 0},
    "MODEL": {"NAME": "micro", "DROP_PATH_RATE": 0.2, "SPATIAL_MAMBA": {"EMBED_DIM": 4, "DEPTHS": [1, 1, 1, 1]}},
    "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "BASE_LR": 0.05, "MODEL_EMA_DECAY": 0.5},
    "AUG": {"MESA": 1.0, "MESA_START": 0.5},
    "AMP_ENABLE": False,
    "DEVICE": "cpu",
    "PRINT_FREQ": 1,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert write_digits(folder) == {"train": 1437, "val": 360}
    return folder


@pytest.fixture(scope="module")
def photos(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of real images, 9 to train and 5 to validate on each: numbers that divide by nothing."""
    root = tmp_path_factory.mktemp("photos") / "set"
    for split, count in (("train", 9), ("val", 5)):
        for digit in "012":
            (root / split / digit).mkdir(parents=True)
            for image in sorted((digits / split / digit).iterdir())[:count]:
                shutil.copy(image, root / split / digit)
    return root


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(yaml.safe_dump(MICRO))
    return path


@pytest.fixture(scope="module")
def trained(micro: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two epochs, the second with MESA."""
    output = tmp_path_factory.mktemp("trained")
    assert main(["--cfg", str(micro), "--data-path", str(photos), "--output", str(output)]) == 0
    return output / "micro" / "default"


def options(micro: Path, photos: Path, output: Path, *more: str) -> list[str]:
    return ["--cfg", str(micro), "--data-path", str(photos), "--output", str(output), *more]


def torchrun(processes: int, *arguments: str, **environment: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(MAIN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL a process and all its descendants: the launcher's processes would outlive it."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, table.splitlines())}
    doomed = [process.pid]
    for victim in doomed:
        doomed += [pid for pid, parent in parents.items() if parent == victim]
    assert len(doomed) >= 3, "the launcher and two processes"
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)


def accuracy_lines(text: str) -> list[str]:
    return [line[line.index("acc@1") :].split(", loss")[0] for line in text.splitlines() if "acc@1" in line]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, through nested containers."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


# --- recipe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dims", "depths", "drop_path", "mesa"),
    [
        ("tiny", 64, [2, 4, 8, 4], 0.2, 1.0),
        ("small", 64, [2, 4, 21, 5], 0.3, 1.5),
        ("base", 96, [2, 4, 21, 5], 0.5, 2.0),
    ],
)
def test_shipped_config_is_the_published_recipe(
    variant: str, dims: int, depths: list[int], drop_path: float, mesa: float
) -> None:
    config, notes = load_config(f"spatialmamba_{variant}")
    assert not notes
    assert (dims, depths) == (config.MODEL.SPATIAL_MAMBA.EMBED_DIM, config.MODEL.SPATIAL_MAMBA.DEPTHS)
    assert (drop_path, mesa, 0.25) == (config.MODEL.DROP_PATH_RATE, config.AUG.MESA, config.AUG.MESA_START)
    assert (config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE) == (1000, 224, 128)
    train, aug = config.TRAIN, config.AUG
    assert (train.EPOCHS, train.WARMUP_EPOCHS, train.CLIP_GRAD, train.WEIGHT_DECAY) == (300, 20, 5.0, 0.05)
    assert (train.MODEL_EMA, train.MODEL_EMA_DECAY) == (True, 0.9999)
    assert (aug.MIXUP, aug.CUTMIX, aug.MIXUP_SWITCH_PROB, config.MODEL.LABEL_SMOOTHING) == (0.8, 1.0, 0.5, 0.1)
    transforms = repr(build_transform(config, is_training=True))
    assert "RandomResizedCrop" in transforms and "RandAugment" in transforms and "RandomErasing" in transforms
    resize, crop, *_ = build_transform(config, is_training=False).transforms
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))


def test_optimizer_and_schedule_of_the_recipe() -> None:
    config, _ = load_config("spatialmamba_digits", [("TRAIN.WARMUP_EPOCHS", 2), ("TRAIN.EPOCHS", 10)])
    config.defrost()
    config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR, config.TRAIN.MIN_LR = 5e-4, 5e-7, 5e-6
    config.DATA.BATCH_SIZE = 128
    model = build_model(config, 10)
    optimizer = build_optimizer(config, model, world_size=8)  # 1024 images: twice the base rates
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(".bias")
        assert decays[id(parameter)] == (0.0 if spared else 0.05), name
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in optimizer.param_groups)

    scheduler = build_scheduler(config, optimizer, updates_per_epoch=10, world_size=8)
    rates = []
    for update in range(100):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[10] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[20] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way through the cosine
    scheduler.step_update(100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_losses_and_targets_follow_the_recipe(micro: Path) -> None:
    config, _ = load_config(micro)
    mixup = build_mixup(config, num_classes=3)
    np.random.seed(0)
    _, targets = mixup(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert targets.min() >= 0.1 / 3 - 1e-6, "labels are smoothed"
    assert type(build_criterion(config)).__name__ == "SoftTargetCrossEntropy"
    plain, _ = load_config(micro, [("AUG.MIXUP", 0), ("AUG.CUTMIX", 0)])
    assert build_mixup(plain, 3) is None
    assert type(build_criterion(plain)).__name__ == "LabelSmoothingCrossEntropy"

    logits, images = torch.randn(4, 3), torch.randn(4, 3)
    loss = engine._self_distillation(logits, images, torch.nn.Identity(), torch.float32)
    expected = -(images.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def published_yaml(variant: str) -> dict[str, Any]:
    """The keys of the published YAML files, all of them."""
    dims, depths, drop_path, mesa = {
        "tiny": (64, [2, 4, 8, 4], 0.2, 1.0),
        "small": (64, [2, 4, 21, 5], 0.3, 1.5),
        "base": (96, [2, 4, 21, 5], 0.5, 2.0),
    }[variant]
    network = {"EMBED_DIM": dims, "DEPTHS": depths, "D_STATE": 1, "MLP_RATIO": 4.0, "DT_INIT": "random"}
    model = {"TYPE": "spatial_mamba", "NAME": variant, "DROP_PATH_RATE": drop_path, "DDP": "torch"}
    return {
        "MODEL": {**model, "SPATIALMAMBA": network},
        "TRAIN": {"EPOCHS": 300, "WARMUP_EPOCHS": 20, "MESA": mesa},
    }


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_published_yaml_is_the_shipped_config(variant: str, tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(published_yaml(variant)))
    config, notes = load_config(tmp_path / "published.yaml")
    assert [note.split(": ")[1] for note in notes] == ["MODEL.DDP has no effect here"]
    shipped, _ = load_config(f"spatialmamba_{variant}")
    differing = {key for key, value in leaves(config) if dict(leaves(shipped))[key] != value}
    assert differing == {"MODEL.NAME", "MODEL.NUM_CLASSES"}  # there a default, the number of the data set's here


def published_run(config: dict[str, Any], images_per_update: int = 1024) -> dict[str, Any]:
    """What the published trainer saves as ``config.json``: all of its settings, the rates scaled."""
    rates = {"BASE_LR": 5e-4, "WARMUP_LR": 5e-7, "MIN_LR": 5e-6}
    train = {
        **{key: rate * images_per_update / 512 for key, rate in rates.items()},
        "START_EPOCH": 0, "WEIGHT_DECAY": 0.05, "CLIP_GRAD": 5.0, "AUTO_RESUME": True, "ACCUMULATION_STEPS": 1,
        "USE_CHECKPOINT": False, "LAYER_DECAY": 1.0, "MOE": {"SAVE_MASTER": False}, "MESA": -1.0,
        "LR_SCHEDULER": {"NAME": "cosine", "DECAY_EPOCHS": 30, "DECAY_RATE": 0.1, "WARMUP_PREFIX": True,
                         "GAMMA": 0.1, "MULTISTEPS": []},
        "OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": [0.9, 0.999], "MOMENTUM": 0.9},
        **config["TRAIN"],
    }  # fmt: skip
    data = {"BATCH_SIZE": 128, "DATA_PATH": "", "DATASET": "imagenet", "IMG_SIZE": 224, "INTERPOLATION": "bicubic",
            "ZIP_MODE": False, "CACHE_MODE": "part", "PIN_MEMORY": True, "NUM_WORKERS": 8, "MASK_PATCH_SIZE": 32,
            "MASK_RATIO": 0.6, "PERSISTENT_WORKERS": True}  # fmt: skip
    model = {"PRETRAINED": "", "RESUME": "", "NUM_CLASSES": 1000, "DROP_RATE": 0.0, "LABEL_SMOOTHING": 0.1,
             "MMCKPT": False}  # fmt: skip
    network = {"IMAGE_SIZE": 224, **config["MODEL"]["SPATIALMAMBA"]}
    return {
        "BASE": [""], "DATA": data, "MODEL": {**model, **config["MODEL"], "SPATIALMAMBA": network}, "TRAIN": train,
        "AUG": {"COLOR_JITTER": 0.4, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "REPROB": 0.25, "REMODE": "pixel",
                "RECOUNT": 1, "MIXUP": 0.8, "CUTMIX": 1.0, "CUTMIX_MINMAX": None, "MIXUP_PROB": 1.0,
                "MIXUP_SWITCH_PROB": 0.5, "MIXUP_MODE": "batch"},
        "TEST": {"CROP": True, "SEQUENTIAL": False, "SHUFFLE": False},
        "AMP_ENABLE": True, "AMP_OPT_LEVEL": "", "OUTPUT": "output/tiny/20240923101550", "TAG": "20240923101550",
        "SAVE_FREQ": 1, "PRINT_FREQ": 10, "SEED": 0, "EVAL_MODE": False, "THROUGHPUT_MODE": False,
        "TRAINCOST_MODE": False, "LOCAL_RANK": 0, "FUSED_WINDOW_PROCESS": False, "FUSED_LAYERNORM": False,
    }  # fmt: skip


def test_a_published_runs_config_keeps_its_learning_rates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(yaml.safe_dump(published_run(published_yaml("small"))))
    config, notes = load_config(tmp_path / "config.json", [("DATA.BATCH_SIZE", 64)])
    assert any("learning rates are taken as they are" in note for note in notes)
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), world_size=16)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert (config.AUG.MESA, config.MODEL.SPATIAL_MAMBA.DEPTHS) == (1.5, [2, 4, 21, 5])
    published = published_yaml("small")
    published["TRAIN"]["MESA"] = -1.0
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(published))
    assert load_config(tmp_path / "plain.yaml")[0].AUG.MESA == 0.0
    assert load_config("spatialmamba_tiny", [("TRAIN.MESA", "-1.0")])[0].AUG.MESA == 0.0
    (tmp_path / "both.yaml").write_text("TRAIN: {MESA: -1.0}\nAUG: {MESA: 0.0}")
    assert load_config(tmp_path / "both.yaml")[0].AUG.MESA == 0.0


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # Two epochs of warm-up of ten, ten updates each, rates 0 to 1.
        ("linear", {0: 0.0, 10: 0.5, 20: 1.0, 60: 1 - 0.99 / 2, 99: 1 - 0.99 * 79 / 80}),
        ("multistep", {10: 0.5, 20: 1.0, 39: 1.0, 40: 0.2, 69: 0.2, 70: 0.04, 99: 0.04}),
        ("step", {10: 0.5, 20: 1.0, 29: 1.0, 30: 0.3, 59: 0.3, 60: 0.09}),
    ],
)
def test_other_schedules_are_the_published_ones(name: str, rates: dict[int, float]) -> None:
    """The formulas of Swin Transformer's schedules, which the published trainer has."""
    schedule = {"NAME": name, "GAMMA": 0.2, "MULTISTEPS": [4, 7], "DECAY_EPOCHS": 3, "DECAY_RATE": 0.3}
    settings = [(f"TRAIN.LR_SCHEDULER.{key}", value) for key, value in schedule.items()]
    settings += [("TRAIN.EPOCHS", 10), ("TRAIN.WARMUP_EPOCHS", 2), ("TRAIN.SCALE_LR", False)]
    settings += [("TRAIN.BASE_LR", 1.0), ("TRAIN.WARMUP_LR", 0.0), ("TRAIN.MIN_LR", 0.0)]
    config, _ = load_config("spatialmamba_tiny", settings)
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), 1)
    scheduler = build_scheduler(config, optimizer, updates_per_epoch=10, world_size=1)
    found = {}
    for update in range(100):
        scheduler.step_update(update)
        found[update] = optimizer.param_groups[0]["lr"]
    assert {update: found[update] for update in rates} == pytest.approx(rates)


def test_published_yaml_loads(tmp_path: Path, micro: Path) -> None:
    """VMamba's keys, which published derivatives use."""
    published = tmp_path / "published.yaml"
    published.write_text(
        yaml.safe_dump(
            {
                "MODEL": {
                    "TYPE": "vssm",
                    "NAME": "published",
                    "DROP_PATH_RATE": 0.3,
                    "VSSM": {"EMBED_DIM": 64, "DEPTHS": [2, 4, 21, 5], "SSM_D_STATE": 1, "SSM_RATIO": 2.0,
                             "SSM_FORWARDTYPE": "v1", "DOWNSAMPLE": "v3"},
                },
                "TRAIN": {"WARMUP_EPOCHS": 20, "MOE": {"SAVE_MASTER": False}},
            }
        )
    )  # fmt: skip
    config, notes = load_config(published)
    assert config.MODEL.SPATIAL_MAMBA.DEPTHS == [2, 4, 21, 5]
    assert sorted(note.split(": ")[1].split()[0] for note in notes) == [
        "MODEL.SPATIAL_MAMBA.DOWNSAMPLE",
        "MODEL.SPATIAL_MAMBA.SSM_FORWARDTYPE",
        "TRAIN.MOE.SAVE_MASTER",
    ]
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"BASE": ["published.yaml"], "TRAIN": {"BASE_LR": "1e-3", "CLIP_GRAD": 1}}))
    config, _ = load_config(child, [("TRAIN.EPOCHS", "50"), ("TAG", "1")])
    assert config.TAG == "1", "a name may look like a number"
    assert (config.MODEL.DROP_PATH_RATE, config.TRAIN.BASE_LR, config.TRAIN.CLIP_GRAD) == (0.3, 1e-3, 1.0)
    assert config.TRAIN.EPOCHS == 50


def test_precision_follows_device_and_config(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    on, _ = load_config(micro, [("AMP_ENABLE", True)])
    off, _ = load_config(micro)
    forced, _ = load_config(micro, [("AMP_ENABLE", True), ("AMP_DTYPE", "float16")])
    for has_bfloat16, on_gpu in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert autocast_dtype(on, cuda) == on_gpu
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for processor, takes_bfloat16, features, on_cpu in (
        ("AVX2 alone", False, "avx2", torch.float32),
        ("AVX-512 without bfloat16", True, "avx2 avx512f", torch.float32),
        ("AVX-512 with bfloat16", True, "avx2 avx512f avx512_bf16", torch.bfloat16),
        ("Arm without bfloat16", False, "asimd", torch.float32),
        ("Arm with bfloat16", True, "asimd bf16", torch.bfloat16),
        ("unknown to this system", True, "", torch.bfloat16),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda takes=takes_bfloat16: takes)
        monkeypatch.setattr(optim, "cpu_features", lambda features=features: set(features.split()))
        assert autocast_dtype(on, cpu) == on_cpu, processor
    assert autocast_dtype(forced, cuda) == torch.float16
    assert autocast_dtype(off, cuda) == torch.float32


# --- data -----------------------------------------------------------------------------------------------------------


def pack(root: Path, form: str, folder: Path) -> Path:
    """The same images in another form."""
    target = folder / form
    target.mkdir()
    for split in ("train", "val"):
        files = sorted(file for file in (root / split).rglob("*") if file.is_file())
        if form == "tar":
            with tarfile.open(target / f"{split}.tar", "w") as archive:
                for file in files:
                    archive.add(file, file.relative_to(root / split))
        elif form in ("tar per class", "tar of tars"):
            (target / split).mkdir()
            for cls in sorted(folder for folder in (root / split).iterdir() if folder.is_dir()):
                with tarfile.open(target / split / f"{cls.name}.tar", "w") as archive:
                    for file in sorted(cls.iterdir()):
                        archive.add(file, file.name)
            if form == "tar of tars":
                (target / split / "._0.tar").write_text("what macOS knows of 0.tar")
                with tarfile.open(target / f"{split}.tar", "w") as archive:
                    archive.add(target / split, ".")
                shutil.rmtree(target / split)
        else:
            with zipfile.ZipFile(target / f"{split}.zip", "w") as archive:
                for file in files:
                    prefix = f"{split}/" if form == "zip with a folder" else ""
                    archive.write(file, prefix + file.relative_to(root / split).as_posix())
            if form == "zip with a map":
                lines = [f"{f.relative_to(root / split).as_posix()}\t{f.parent.name}\n" for f in files]
                (target / f"{split}_map.txt").write_text("".join(lines))
    return target


FORMS = ["tar", "tar per class", "tar of tars", "zip", "zip with a folder"]


@pytest.mark.parametrize("form", [*FORMS, "zip with a map"])
def test_archives_hold_what_folders_hold(photos: Path, tmp_path: Path, form: str) -> None:
    packed = pack(photos, form, tmp_path)
    for split in ("train", "val"):
        plain = open_split(str(photos), split)
        other = open_split(str(packed), split, zip_mode=form.startswith("zip"))
        assert other.classes == plain.classes == ["0", "1", "2"]
        both = [{(r.label(i), r.read(i)) for i in range(len(r))} for r in (plain, other)]
        assert both[0] == both[1] and len(both[0]) == len(plain) == len(other)


@pytest.mark.parametrize("form", ["tar", "tar per class", "zip"])
def test_class_numbers_do_not_depend_on_the_form(digits: Path, tmp_path: Path, form: str) -> None:
    """With twelve classes numerical and alphabetical order differ."""
    names = [str(i) for i in range(12)]
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "plain" / split / name).mkdir(parents=True)
            shutil.copy(next((digits / "val" / "3").iterdir()), tmp_path / "plain" / split / name / f"in_{name}.png")
    reader = open_split(str(pack(tmp_path / "plain", form, tmp_path)), "train")
    assert reader.classes == open_split(str(tmp_path / "plain"), "train").classes == sorted(names)
    for i in range(12):
        assert reader.name(i).endswith(f"in_{reader.classes[reader.label(i)]}.png")


@pytest.mark.parametrize("form", ["folders", *FORMS])
def test_hidden_files_are_no_data(photos: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """What macOS, Jupyter and editors leave behind is counted once, and everything else is as without it."""
    messy = tmp_path / "messy"
    shutil.copytree(photos, messy)
    clutter = [
        ".DS_Store",
        ".ipynb_checkpoints/0.png",
        "0/._x.png",
        "0/.x.png",
        "0/.ipynb_checkpoints/x.png",
        "1/x.txt",
        "@eaDir/0.png",
    ]
    for name in [*clutter, "__MACOSX/0/._x.png"]:
        path = messy / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")
    assert [path.name for path in find_images([messy / "train" / "0"])] == [
        path.name for path in sorted((photos / "train" / "0").iterdir())
    ]
    clean = open_split(str(photos), "train")
    with caplog.at_level("WARNING", logger="spatial_mamba"):
        reader = open_split(str(messy if form == "folders" else pack(messy, form, tmp_path)), "train")
    assert reader.classes == clean.classes
    assert {(reader.label(i), reader.read(i)) for i in range(len(reader))} == {
        (clean.label(i), clean.read(i)) for i in range(len(clean))
    }
    assert len(reader) == len(clean)
    (message,) = {record.getMessage() for record in caplog.records}
    count = int(re.search(r"ignored (\d+) files", message)[1])
    assert count == (4 if form == "tar per class" else 8), message  # hidden tars in a folder are not opened


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("0/self", "."),
        ("0/up", "../.."),
        ("0/top", "../../.."),
        ("again", "."),
        ("circle", "circle"),
        ("1/back", "{root}"),
    ],
)
def test_links_are_followed_but_not_back_up(photos: Path, tmp_path: Path, link: str, target: str) -> None:
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    shutil.move(root / "train" / "1", tmp_path / "elsewhere")
    (root / "train" / "1").symlink_to(tmp_path / "elsewhere")
    (root / "train" / link).symlink_to(target.format(root=root))
    linked, plain = (open_split(str(folder), "train") for folder in (root, photos))
    assert (linked.classes, linked.samples) == (plain.classes, plain.samples)


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_links_that_lead_nowhere_are_ignored_and_empty_classes_are_not(
    photos: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    image = next((root / "train" / "0").iterdir())
    (root / "train/0/broken.png").symlink_to("absent.png")
    (root / "train/0/itself.png").symlink_to("itself.png")
    (root / "train/2/link.png").symlink_to(f"../0/{image.name}")

    def opened() -> Any:
        if form == "folders":
            return open_split(str(root), "train")
        (tmp_path / "packed").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "packed/train.tar", "w") as archive:
            archive.add(root / "train", ".")
        return open_split(str(tmp_path / "packed"), "train")

    with caplog.at_level("WARNING", logger="spatial_mamba"):
        reader = opened()
    assert "ignored 2 files" in caplog.text
    found = {reader.name(i)[-10:]: reader.read(i) for i in range(len(reader))}
    assert found["2/link.png"] == image.read_bytes()
    assert len(found) == len(open_split(str(photos), "train")) + 1
    (root / "train/aaa").mkdir()
    with pytest.raises(InputError, match="class folder aaa holds no image; fill or remove it"):
        opened()


def test_class_lists_of_every_make(photos: Path, tmp_path: Path) -> None:
    packed = pack(photos, "zip", tmp_path)
    members = [f"{cls}/{next((photos / 'train' / cls).iterdir()).name}" for cls in "012"]
    with zipfile.ZipFile(packed / "train.zip", "a") as archive:
        archive.writestr("0/.listed.png", b"")

    def read(text: bytes, split: str = "train") -> Any:
        (packed / f"{split}_map.txt").write_bytes(text)
        return open_split(str(packed), split, zip_mode=True)

    lines = [f"{member}\t{label}" for label, member in enumerate([*members, "0/.listed.png"])]
    plain = "\n".join(lines)
    for text in (plain, "\ufeff" + plain + "\n\n", plain.replace("\n", "\r\n") + "\r\n \r\n"):
        reader = read(text.encode())
        assert [reader.samples, reader.classes] == [
            [(line.split("\t")[0], label) for label, line in enumerate(lines)],
            ["0", "1", "2", "3"],
        ]
    for text, message in (
        (plain.encode("utf-16"), "train_map.txt, line 1: not UTF-8 text"),
        (f"{lines[0]}\nf\xe4.png\t1".encode("latin-1"), "train_map.txt, line 2: not UTF-8 text"),
        (f"{lines[0]}\n\n{members[1]}\t7".encode(), "train_map.txt, line 3: class 7, but no line has class 1"),
        (f"{lines[0]}\n{members[1]}\t9999999".encode(), "train_map.txt, line 2: expected a member name"),
    ):
        with pytest.raises(InputError, match=message):
            read(text)
    shutil.copy(packed / "train.zip", packed / "val.zip")
    assert len(read(f"{members[0]}\t5".encode(), "val").classes) == 6, "a part of the classes will do to evaluate"


def test_splits_must_number_their_classes_alike(micro: Path) -> None:
    """A list of numbers counts 2 before 10, folders named by them do not."""
    config, _ = load_config(micro)
    assert check_classes(config, ["0", "1"], ["0", "1"]) == 2
    with pytest.raises(InputError, match="number them in different orders"):
        check_classes(config, ["10", "2"], ["2", "10"])


def test_damaged_archive_members_count_as_unreadable(photos: Path, micro: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / "set" / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted((photos / split).glob("*/*.png")):
                archive.writestr(f"{file.parent.name}/{file.name}", bytes(2000) + file.read_bytes())
            first = archive.infolist()[0]
    with (tmp_path / "set" / "train.zip").open("r+b") as file:
        file.seek(len(first.filename) + 32)  # into the packed data behind the header
        file.write(b"\xff" * 8)
    data = ImageData(open_split(str(tmp_path / "set"), "train"), build_transform(load_config(micro)[0], True))
    with pytest.raises(InputError, match="unreadable image"):
        data[0, 0]


def ramp(folder: Path, name: str, mode: str) -> tuple[Path, np.ndarray]:
    """A file (1, 256) of 16-bit, 32-bit or floating-point grey, and its pixels in 8 bits."""
    grey = np.arange(256)
    path = folder / name
    Image.fromarray((grey * 257 + (grey % 3 - 1) * 128).clip(0, 65535).astype(mode)[None]).save(path)
    return path, np.repeat(grey[None, :, None], 3, axis=2)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_16_bit_images_keep_their_greys(name: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    path, expected = ramp(tmp_path / "train" / "a", name, "uint16")
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)
    data = ImageData(open_split(str(tmp_path), "train"), np.asarray)
    np.testing.assert_array_equal(data[0, 0][0], expected)


def test_12_bit_images_keep_their_greys(tmp_path: Path) -> None:
    """As some microscopes write them, uncompressed and two pixels in three bytes."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 8 * 12 + 4), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    pixels = bytes.fromhex("000800fff3e8")
    path = tmp_path / "grey.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 128, 255, 62]


@pytest.mark.parametrize(("mode", "pixels"), [("float32", "floating-point"), ("int32", "32-bit integer")])
def test_images_without_a_known_range_are_refused(mode: str, pixels: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    path, _ = ramp(tmp_path / "train" / "a", "grey.tif", mode)
    message = rf"{path}: .*\({pixels} pixels have no known range; save it with 8 or 16 bits per channel"
    with pytest.raises(ImageFileError, match=message):
        read_image(path)
    with pytest.raises(InputError, match=message):
        ImageData(open_split(str(tmp_path), "train"), np.asarray)[0, 0]


def test_exif_turns_a_users_images_and_a_data_set_on_request(micro: Path, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (64, 32)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 32, 32))
    exif[0x0112] = 6  # to be turned to the right, where the white half is at the top
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        path = tmp_path / split / "a" / "photo.jpg"
        image.save(path, exif=exif)
    assert read_image(path).size == (32, 64)
    for turn in (False, True):
        config, _ = load_config(
            micro, [("DATA.DATA_PATH", str(tmp_path)), ("DATA.EXIF_ORIENTATION", turn), ("TEST.CROP", False)]
        )
        corner = build_val_loader(config, CPU).dataset[0, 0][0][0][2, -3]
        assert (corner > 0) == turn


def test_cached_images_need_no_files(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    cached = CachedReader(open_split(str(copy), "val"), indices=range(0, 15, 2))
    shutil.rmtree(copy)
    plain = open_split(str(photos), "val")
    assert all(cached.read(i) == plain.read(i) and cached.label(i) == plain.label(i) for i in range(0, 15, 2))
    with pytest.raises(OSError):
        cached.read(1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samplers_deal_out_every_image_once(world_size: int) -> None:
    processes = [Process(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    assert sorted(i for p in processes for i, _ in EvalSampler(10, p)) == list(range(10))

    for sharded in (False, True):
        samplers = [TrainSampler(10, p, seed=1, sharded=sharded) for p in processes]
        epochs = []
        for epoch in (0, 1, 0):
            for sampler in samplers:
                sampler.epoch = epoch
            shares = [list(sampler) for sampler in samplers]
            assert {len(share) for share in shares} == {10 // world_size} == {len(samplers[0])}
            indices = [i for share in shares for i, _ in share]
            assert len(set(indices)) == len(indices), "no image twice in an epoch"
            if sharded:
                assert all(i % world_size == rank for rank, share in enumerate(shares) for i, _ in share)
            epochs.append(shares)
        assert epochs[0] == epochs[2] != epochs[1]


def test_augmentation_is_a_function_of_the_seed(photos: Path, micro: Path) -> None:
    config, _ = load_config(micro)
    data = ImageData(open_split(str(photos), "train"), build_transform(config, is_training=True))
    seed_everything(0)
    first = data[3, 7][0]
    state = torch.get_rng_state()
    other = data[3, 8][0]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.randn(5)
    assert torch.equal(data[3, 7][0], first)
    assert not torch.equal(other, first)


def test_unreadable_training_images_are_skipped_and_counted_on_request(
    photos: Path, micro: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    victim = sorted((broken / "train" / "1").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:40])
    arguments = options(micro, broken, tmp_path / "out", "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0")
    assert main([*arguments, "DATA.SKIP_UNREADABLE", "True", "DATA.BATCH_SIZE", "26"]) == 0
    record = json.loads((tmp_path / "out/micro/default/metrics.jsonl").read_text())
    assert record["unreadable_images"] == 1


# --- training -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_records(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["skipped_updates"] == 0 and line["train_loss"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["val_acc1"] <= line["val_acc5"] <= 100 and 0 <= line["ema_acc1"] <= 100
    assert lines[1]["updates"] == 2 * (27 // 4)
    saved = CfgNode.load_cfg((trained / "config.yaml").read_text())
    assert saved.TRAIN.EPOCHS == 2 and saved.AUG.MESA == 1.0
    assert "epoch 2/2" in (trained / "log.txt").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_second", "train/data_time",
            "val/acc1", "ema/acc1"} <= set(events.Tags()["scalars"])  # fmt: skip
    assert len(events.Scalars("train/loss")) == 12


def test_evaluation_agrees_whatever_processes_and_batch_size(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    best = max(json.loads(line)["val_acc1"] for line in (trained / "metrics.jsonl").read_text().splitlines())
    arguments = options(micro, photos, tmp_path / "none", "--eval", "--pretrained", str(trained / BEST))
    results = []
    for batch in ("4", "7"):
        assert main([*arguments, "--batch-size", batch]) == 0
        results.append(accuracy_lines(capfd.readouterr().out))
    with torchrun(2, *arguments) as process:
        results.append(accuracy_lines(process.communicate()[0]))
        assert process.returncode == 0
    assert len(results[0]) == 2, "the model and its EMA"
    assert results[0] == results[1] == results[2]
    assert f"acc@1 {best:.3f}%" in results[0][0] and "/15)" in results[0][0]
    assert not (tmp_path / "none").exists()


def test_killed_training_resumes_to_the_same_weights(micro: Path, photos: Path, tmp_path: Path) -> None:
    """Two processes with loader workers, killed with SIGKILL in the middle of an epoch."""
    more = ("--epochs", "3", "--workers", "1", "--batch-size", "2")
    with torchrun(2, *options(micro, photos, tmp_path / "undisturbed", *more)) as process:
        output = process.communicate()[0]
        assert process.returncode == 0, output

    arguments = options(micro, photos, tmp_path / "killed", *more)
    with torchrun(2, *arguments) as process:
        for line in process.stdout:
            if "epoch 2/3 update 3/6" in line:
                kill_all(process)
                break
        else:
            pytest.fail("the run was never in the middle of its second epoch")
    assert read_checkpoint(tmp_path / "killed" / "micro" / "default" / LATEST)["epoch"] == 0
    with torchrun(2, *arguments) as process:
        output = process.communicate()[0]
        assert process.returncode == 0 and "resumed from" in output, output

    runs = [tmp_path / name / "micro" / "default" for name in ("undisturbed", "killed")]
    a, b = (read_checkpoint(run / LATEST) for run in runs)
    assert a.pop("config")["OUTPUT"] != b.pop("config")["OUTPUT"]
    assert_same(a, b)
    figures = [
        [(r["epoch"], r["train_loss"], r["val_acc1"], r["ema_acc1"]) for r in map(json.loads, lines)]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in runs)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 3


def test_accumulation_and_activation_checkpointing(micro: Path, photos: Path, tmp_path: Path) -> None:
    """Two steps make one update, and recomputed activations change nothing."""
    more = ("--accumulation-steps", "2", "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0")
    assert main(options(micro, photos, tmp_path / "a", *more)) == 0
    assert main(options(micro, photos, tmp_path / "b", "--use-checkpoint", *more)) == 0
    a, b = (read_checkpoint(tmp_path / name / "micro" / "default" / LATEST) for name in "ab")
    assert a["steps"] == 27 // 4 // 2
    assert_same(a["model"], b["model"])


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> None:
    """Let the model see NaN in chosen training steps, as an overflow would make it."""
    steps = itertools.count()

    class Poisoned(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, process: Process) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images * float("nan") if is_bad(next(steps)) else images)

    monkeypatch.setattr(trainer, "_parallel", Poisoned)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_non_finite_updates_are_skipped_and_counted(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    poison(monkeypatch, lambda step: step in (1, 3))
    more = ["--amp-dtype", "float16", "--opts", "AMP_ENABLE", "True"] if precision == "float16" else []
    assert main(options(micro, photos, tmp_path, *more)) == 0
    records = [json.loads(line) for line in (tmp_path / "micro/default/metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_updates"] for r in records] == [2, 0]
    checkpoint = read_checkpoint(tmp_path / "micro/default" / LATEST)
    for state in (checkpoint["model"], checkpoint["model_ema"]):
        assert all(torch.isfinite(tensor).all() for tensor in state.values()), "running statistics included"
    if precision == "float16":
        assert checkpoint["scaler"]["scale"] == 2.0**16 / 4, "the loss scale was halved twice"


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, lambda step: step >= 6)  # all of the second epoch
    assert main(options(micro, photos, tmp_path, "--opts", "TRAIN.MAX_SKIPPED_UPDATES", "4")) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: 4 updates in a row had a non-finite loss") and "\n" not in error
    assert read_checkpoint(tmp_path / "micro/default" / LATEST)["epoch"] == 0


def test_pretrained_weights_are_evaluated_first(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = options(micro, photos, tmp_path, "--pretrained", str(trained / BEST_EMA), "--epochs", "1")
    assert main([*arguments, "--opts", "TRAIN.WARMUP_EPOCHS", "0"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "acc@1" in line]
    best = max(json.loads(line)["ema_acc1"] for line in (trained / "metrics.jsonl").read_text().splitlines())
    assert str(trained / BEST_EMA) in lines[0] and f"EMA   acc@1 {best:.3f}%" in lines[1]
    assert "epoch 1/1" in lines[2]


def test_throughput_is_printed_for_each_batch_size(
    micro: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "measure_throughput", functools.partial(engine.measure_throughput, seconds=0.0))
    assert main(["--cfg", str(micro), "--throughput", "2", "1"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "throughput" in line]
    assert [line.split("batch ")[1].split(",")[0] for line in lines] == ["1", "2"]
    assert all("images/s" in line and "peak memory" in line for line in lines)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_checkpoint(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / LATEST).read_bytes()
    config, _ = load_config("spatialmamba_digits")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = engine.TrainingState(
        model, None, optimizer, build_scheduler(config, optimizer, 1, 1), torch.amp.GradScaler(enabled=False), ["a"]
    )

    def torn(content: Any, path: Path) -> None:
        path.write_bytes(b"half a checkpoint")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(InputError, match=r"cannot be written \(disk full\)"):
            save_checkpoint(state, config, folder / LATEST)
    assert not [path for path in folder.iterdir() if "unfinished" in path.name]
    assert (folder / LATEST).read_bytes() == before
    save_checkpoint(state, config, folder / LATEST)
    assert set(read_checkpoint(folder / LATEST)["model"]) == {"weight", "bias"}


def test_auto_resume_takes_the_newest_whole_checkpoint(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "micro" / "default"
    shutil.copytree(trained, folder)
    torn = (folder / LATEST).read_bytes()[:5000]
    (folder / LATEST).write_bytes(torn)
    assert main(options(micro, photos, tmp_path)) == 0
    output = capfd.readouterr().out
    assert "skipping" in output and f"{LATEST}: " in output
    assert f"resumed from {folder / BEST}" in output or f"resumed from {folder / BEST_EMA}" in output


def published_checkpoint(trained: Path, path: Path) -> Path:
    """Our checkpoint, laid out as the published trainer writes it: its config with rates scaled, steps 0, a typo."""
    content = torch.load(trained / LATEST, weights_only=True)
    content["max_accuray_ema"] = np.float64(content.pop("max_accuracy_ema"))
    content["steps"] = 0
    network = {"EMBED_DIM": 4, "DEPTHS": [1, 1, 1, 1], "D_STATE": 1, "MLP_RATIO": 4.0, "DT_INIT": "random"}
    model = {"TYPE": "spatial_mamba", "NAME": "micro", "DROP_PATH_RATE": 0.2, "DDP": "torch", "SPATIALMAMBA": network}
    config = published_run(
        {"MODEL": model, "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "MESA": 1.0}}, images_per_update=4
    )
    config["TRAIN"]["BASE_LR"] = 0.05 * 4 / 512
    config["DATA"] |= {"IMG_SIZE": 32, "BATCH_SIZE": 4}
    config |= {"AMP_ENABLE": False}
    config["MODEL"]["NUM_CLASSES"] = 3
    content["config"] = CfgNode(config)
    # The group with weight decay comes first there, and parameters are numbered in that order.
    spared, decayed = content["optimizer"]["param_groups"]
    order = decayed["params"] + spared["params"]
    content["optimizer"]["state"] = {i: content["optimizer"]["state"][old] for i, old in enumerate(order)}
    decayed["params"] = list(range(len(decayed["params"])))
    spared["params"] = list(range(len(decayed["params"]), len(order)))
    content["optimizer"]["param_groups"] = [decayed, spared]
    del content["skipped_in_a_row"]
    torch.save(content, path)
    return path


def test_published_checkpoints_load_and_resume(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = published_checkpoint(trained, tmp_path / "published.pth")
    assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(path))) == 0
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    lines = accuracy_lines(capfd.readouterr().out)
    assert f"{last['val_acc1']:.3f}%" in lines[0] and f"{last['ema_acc1']:.3f}%" in lines[1]

    config, notes = load_config(
        micro, [("DATA.DATA_PATH", str(photos)), ("OUTPUT", str(tmp_path)), ("MODEL.RESUME", str(path))]
    )
    job = prepare(config, notes)
    assert capfd.readouterr().out == ""  # no setting differs in meaning
    assert (job.state.epoch, job.state.updates) == (1, 12)
    assert job.state.max_accuracy_ema == last["max_accuracy_ema"]
    assert_same(job.state.optimizer.state_dict(), read_checkpoint(trained / LATEST)["optimizer"])


def test_a_published_runs_folder_is_resumed(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "micro" / "20240923").mkdir(parents=True)
    path = published_checkpoint(trained, tmp_path / "micro" / "20240923" / "latest_ckpt.pth")
    flags = ["--fused_layernorm", "--model_ema_force_cpu", "False", "--memory_limit_rate", "0.9", "--ddp", "torch"]
    flags += ["--enable_preload", "--enable_persistance", "--model_ema", "t"]
    assert main(options(micro, photos, tmp_path, "--tag", "20240923", *flags)) == 0
    output = capfd.readouterr().out
    assert f"resumed from {path} after epoch 2" in output
    ignored = ("fused_layernorm", "model_ema_force_cpu", "memory_limit_rate", "ddp", "enable_preload")
    assert all(f"command line: --{option} has no effect here" in output for option in ignored)


def test_pretrained_is_evaluated_first_whatever_the_folder_holds(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "micro" / "default")
    torch.manual_seed(1)
    other = SpatialMamba(dims=4, depths=(1, 1, 1, 1), num_classes=3)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    command = options(micro, photos, tmp_path, "--pretrained", str(tmp_path / "other.pth"))
    assert main([*command, "--eval"]) == 0
    [alone] = accuracy_lines(capfd.readouterr().out)
    before = read_checkpoint(tmp_path / "micro" / "default" / LATEST)
    assert main(command) == 0
    output = capfd.readouterr().out
    assert accuracy_lines(output)[0] == alone
    assert output.index("other.pth: model") < output.index("resumed from")
    assert "training does not start from --pretrained" in output and "this run is finished" in output
    assert_same(before["model"], read_checkpoint(tmp_path / "micro" / "default" / LATEST)["model"])


@pytest.mark.parametrize(("zipped", "mode"), [(False, "part"), (True, None), (True, "part"), (True, "no")])
def test_processes_keep_to_their_own_images_with_zip_only(
    photos: Path, micro: Path, tmp_path: Path, zipped: bool, mode: str | None
) -> None:
    settings = [("DATA.DATA_PATH", str(pack(photos, "zip", tmp_path) if zipped else photos))]
    settings += [("DATA.ZIP_MODE", zipped), *([("DATA.CACHE_MODE", mode)] if mode else [])]
    config, _ = load_config(micro, settings)
    process = Process(1, 2, torch.device("cpu"))
    seen = set()
    loader = build_train_loader(config, process)
    for loader.sampler.epoch in range(40):
        seen |= {index for index, _ in loader.sampler}
    assert seen == (set(range(1, 27, 2)) if zipped and mode != "no" else set(range(27)))


def test_checkpoints_of_numpy_1_load(tmp_path: Path) -> None:
    torch.save({"best": np.float64(83.5)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core", b"numpy.core"))
    assert read_checkpoint(tmp_path / "new.pth") == read_checkpoint(tmp_path / "old.pth") == {"best": 83.5}


def test_resuming_says_what_changed_and_keeps_the_records(
    trained: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "micro" / "default"
    shutil.copytree(trained, folder)
    more = ("--epochs", "3", "--opts", "TRAIN.WEIGHT_DECAY", "0.1", "DATA.BATCH_SIZE", "6")
    assert main(options(micro, photos, tmp_path, *more)) == 0
    log = (folder / "log.txt").read_text()
    assert "TRAIN.WEIGHT_DECAY was 0.05 when it was saved and is 0.1 now" in log
    assert "its 2 epochs had 12 updates" in log and "they have 8" in log
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert read_checkpoint(folder / LATEST)["steps"] == 3 * (27 // 6)


def test_resuming_keeps_the_last_epoch_in_tensorboard(trained: Path, micro: Path, photos: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "micro" / "default"
    shutil.copytree(trained, folder)
    assert main(options(micro, photos, tmp_path, "--epochs", "3")) == 0
    scalars = EventAccumulator(str(folder)).Reload().Scalars("val/acc1")
    assert [scalar.step for scalar in scalars] == [6, 12, 18]


def test_two_trainings_do_not_share_a_folder(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "micro" / "default"
    shutil.copytree(trained, folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(options(micro, photos, tmp_path, "--epochs", "3")) == 2
    assert "another training is writing here" in capfd.readouterr().err
    assert read_checkpoint(folder / LATEST)["epoch"] == 1


class Exploit:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_a_foreign_type_in_a_checkpoint_is_refused_unexecuted(
    micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    torch.save({"model": {}, "extra": Exploit(tmp_path / "executed")}, tmp_path / "evil.pth")
    assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(tmp_path / "evil.pth"))) == 2
    error = capfd.readouterr().err
    assert "evil.pth: refused, because it asks to load posix.mkdir" in error
    assert not (tmp_path / "executed").exists()


def test_finetuning_replaces_a_classifier_of_another_size(
    trained: Path, micro: Path, digits: Path, tmp_path: Path
) -> None:
    config, notes = load_config(
        micro,
        [("DATA.DATA_PATH", str(digits)), ("OUTPUT", str(tmp_path)), ("MODEL.PRETRAINED", str(trained / BEST)),
         ("MODEL.FINETUNE", True)],
    )  # fmt: skip
    job = prepare(config, notes)
    source = read_checkpoint(trained / BEST)["model"]
    for name, tensor in job.state.model.state_dict().items():
        if name.startswith("head."):
            assert tensor.shape[0] == 10
        else:
            assert torch.equal(tensor, source[name]), name


def renamed(photos: Path, folder: Path, names: dict[str, str]) -> Path:
    """The photos with other names of classes; a class without one is left out."""
    for split in ("train", "val"):
        for old, new in names.items():
            shutil.copytree(photos / split / old, folder / split / new)
    return folder


def right_answers(text: str) -> list[int]:
    """Of the model and its EMA, in the order of the lines."""
    return [int(count) for count in re.findall(r"acc@1 [\d.]+% \((\d+)/", text)]


def test_weights_are_evaluated_under_the_names_of_frameworks(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    content = torch.load(trained / BEST, weights_only=True)
    model = {f"net.{name}": tensor for name, tensor in content["model"].items()}
    ema = {f"module.{name}": tensor for name, tensor in content["model_ema"].items()}
    torch.save({"state_dict": model, "model_ema": ema, "config": content["config"]}, tmp_path / "framework.pth")
    results = []
    for path in (trained / BEST, tmp_path / "framework.pth"):
        assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(path))) == 0
        output = capfd.readouterr().out
        results.append(accuracy_lines(output))
    assert results[0] == results[1] and len(results[0]) == 2
    assert output.count("framework.pth: takes its weights named net.* without this prefix") == 1


def test_evaluation_finds_the_classes_by_name(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """In whatever order the checkpoint has them, and for some of them."""

    def evaluate(checkpoint: Path, data: Path) -> list[str]:
        assert main(options(micro, data, tmp_path, "--eval", "--pretrained", str(checkpoint))) == 0
        return accuracy_lines(capfd.readouterr().out)

    expected = evaluate(trained / BEST, photos)
    content = torch.load(trained / BEST, weights_only=True)
    content["classes"] = ["2", "0", "1"]
    for state in (content["model"], content["model_ema"]):
        state |= {name: state[name][[2, 0, 1]] for name in ("head.weight", "head.bias")}
    torch.save(content, tmp_path / "reordered.pth")
    assert evaluate(tmp_path / "reordered.pth", photos) == expected

    parts = [renamed(photos, tmp_path / name, dict(zip(name, name, strict=True))) for name in ("20", "1")]
    counts = [right_answers("\n".join(evaluate(tmp_path / "reordered.pth", part))) for part in parts]
    assert [sum(pair) for pair in zip(*counts, strict=True)] == right_answers("\n".join(expected))


def test_evaluation_refuses_other_classes(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = renamed(photos, tmp_path / "data", {"0": "0", "1": "cat", "2": "dog"})
    few = renamed(photos, tmp_path / "few", {"0": "0", "1": "1"})
    torch.save({"model": read_checkpoint(trained / BEST)["model"]}, tmp_path / "nameless.pth")
    for checkpoint, folder, message in (
        (trained / BEST, data, f"{data}: the classes are not those of the checkpoint: only the data has cat, dog and"),
        (tmp_path / "nameless.pth", few, f"{few}: the data set has 2 classes, the classifier of"),
    ):
        assert main(options(micro, folder, tmp_path, "--eval", "--pretrained", str(checkpoint))) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {message}") and "--finetune" not in error


def test_a_run_is_not_resumed_on_other_classes(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Else a second data set with the default tag would be finished at once."""
    shutil.copytree(trained, tmp_path / "micro" / "default")
    data = renamed(photos, tmp_path / "data", {"0": "cat", "1": "dog", "2": "cow"})
    few = renamed(photos, tmp_path / "few", {"0": "0", "1": "1"})
    reordered = renamed(photos, tmp_path / "reordered", {"0": "0", "1": "1", "2": "2"})
    for folder, message in (
        (data, "only the data has cat, cow, dog and only the checkpoint has 0, 1, 2; start a new run under another"),
        (few, "only the checkpoint has 2;"),
    ):
        assert main(options(micro, folder, tmp_path)) == 2
        assert f"cannot resume with other classes: {message}" in capfd.readouterr().err
    nameless = read_checkpoint(trained / LATEST)
    del nameless["classes"]
    torch.save(nameless, tmp_path / "nameless.pth")
    assert main(options(micro, few, tmp_path / "new", "--resume", str(tmp_path / "nameless.pth"))) == 2
    assert "cannot resume with other classes: it has 3, the data 2;" in capfd.readouterr().err
    nameless["classes"] = ["1", "0", "2"]
    torch.save(nameless, tmp_path / "order.pth")
    assert main(options(micro, reordered, tmp_path / "new", "--resume", str(tmp_path / "order.pth"))) == 2
    assert "cannot resume with other classes: they are in another order;" in capfd.readouterr().err


def test_a_pretrained_classifier_is_taken_over_by_name(
    trained: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    source = read_checkpoint(trained / BEST)

    def head(data: Path, classes: list[str] | None, *settings: tuple[str, Any]) -> Tensor:
        torch.save({**source, "classes": classes}, tmp_path / "start.pth")
        config, notes = load_config(
            micro,
            [("DATA.DATA_PATH", str(data)), ("OUTPUT", str(tmp_path)),
             ("MODEL.PRETRAINED", str(tmp_path / "start.pth")), *settings],
        )  # fmt: skip
        return prepare(config, notes).state.model.head.weight

    expected = source["model"]["head.weight"]
    other = renamed(photos, tmp_path / "other", {"0": "cat", "1": "dog", "2": "cow"})
    assert torch.equal(head(photos, ["0", "1", "2"]), expected)
    assert torch.equal(head(photos, ["2", "0", "1"]), expected[[1, 2, 0]])
    assert torch.equal(head(other, None), expected), "a checkpoint without names is taken as it is"
    with pytest.raises(InputError, match=r"is for other classes: only the data has cat, cow, dog .* add --finetune"):
        head(other, ["0", "1", "2"])
    assert not torch.equal(head(other, ["0", "1", "2"], ("MODEL.FINETUNE", True)), expected)


def test_numbers_of_a_list_are_no_names(trained: Path, micro: Path, photos: Path, tmp_path: Path) -> None:
    data = pack(renamed(photos, tmp_path / "data", {"0": "0", "1": "1", "2": "2"}), "zip with a map", tmp_path)
    named = read_checkpoint(trained / BEST)
    named["classes"] = ["cat", "cow", "dog"]
    torch.save(named, tmp_path / "named.pth")
    settings = [("DATA.DATA_PATH", str(data)), ("OUTPUT", str(tmp_path)), ("MODEL.PRETRAINED", tmp_path / "named.pth")]
    config, notes = load_config(micro, [(key, str(value)) for key, value in settings])
    job = prepare(config, notes)
    assert job.state.classes is None
    assert torch.equal(job.state.model.head.weight, named["model"]["head.weight"])


@pytest.mark.parametrize("name", ["sgd", "lamb", "adam", "nadamw"])
def test_the_state_of_another_optimiser_is_refused(
    name: str, trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = options(micro, photos, tmp_path, "--optim", name, "--resume", str(trained / LATEST))
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert f"was trained by adamw, this run by {name}; add --optim adamw, or start a new run" in error
    if name == "sgd":
        content = read_checkpoint(trained / LATEST)
        del content["config"]
        torch.save(content, tmp_path / "bare.pth")
        assert main([*arguments[:-1], str(tmp_path / "bare.pth")]) == 2
        assert "another optimiser than sgd: it keeps exp_avg, exp_avg_sq, step, sgd" in capfd.readouterr().err
        assert main([*options(micro, photos, tmp_path), "--resume", str(tmp_path / "bare.pth")]) == 0


# --- wrong inputs ---------------------------------------------------------------------------------------------------


def damage_config(text: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "bad.yaml").write_text(text)
        return ["--cfg", str(folder / "bad.yaml")]

    return make


def damage_data(change: Callable[[Path], Any]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        shutil.copytree(folder / "photos", folder / "damaged")
        change(folder / "damaged")
        return ["--data-path", str(folder / "damaged")]

    return make


def damage_checkpoint(content: Any) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / "bad.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return ["--pretrained", str(path)]

    return make


def add(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: [argument.replace("FOLDER", str(folder)) for argument in arguments]


def truncate_image(root: Path) -> None:
    for image in (root / "val" / "2").iterdir():
        image.write_bytes(image.read_bytes()[:40])


def break_zip(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train.zip").write_text("no archive")


def break_tar(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "0.tar").write_text("no archive")


def rewrap_checkpoint(folder: Path) -> list[str]:
    content = read_checkpoint(folder / "run/micro/default" / BEST)
    content["model"]["head.weight"] = torch.zeros(7, 32)
    content["model"]["head.bias"] = torch.zeros(7)
    torch.save(content, folder / "seven.pth")
    return ["--pretrained", str(folder / "seven.pth")]


def drop_optimizer(folder: Path) -> list[str]:
    content = read_checkpoint(folder / "run/micro/default" / BEST)
    torch.save({"model": content["model"]}, folder / "weights.pth")
    return ["--resume", str(folder / "weights.pth")]


def truncate_checkpoint(folder: Path) -> list[str]:
    whole = (folder / "run/micro/default" / BEST).read_bytes()
    (folder / "torn.pth").write_bytes(whole[: len(whole) // 2])
    return ["--pretrained", str(folder / "torn.pth")]


def other_variant(folder: Path) -> list[str]:
    state = SpatialMamba(dims=8, depths=(1,), num_classes=3, fusion_dilations=()).state_dict()
    torch.save({"model": state}, folder / "other.pth")
    return ["--pretrained", str(folder / "other.pth")]


def published_output(folder: Path) -> list[str]:
    (folder / "20240923101550").mkdir()
    (folder / "20240923101550" / "latest_ckpt.pth").touch()
    return ["--output", str(folder / "20240923101550")]


WRONG = {
    # options
    "unknown option": (add("--batchsize", "4"), "unrecognized arguments: --batchsize 4"),
    "option without value": (add("--tag"), "argument --tag: expected one argument"),
    "text for a number": (add("--epochs", "many"), "argument --epochs: invalid int value: 'many'"),
    "odd opts": (add("--opts", "TRAIN.EPOCHS"), "--opts takes pairs of KEY VALUE"),
    "unknown shipped config": (
        add("--cfg", "spatialmamba_tny"),
        "no config of the package; did you mean spatialmamba_tiny?",
    ),
    "unknown opts key": (add("--opts", "TRAIN.EPOCH", "3"), "unknown config key TRAIN.EPOCH; did you mean"),
    "section as opts key": (add("--opts", "TRAIN", "3"), "TRAIN is a section"),
    "wrong opts type": (add("--opts", "TRAIN.EPOCHS", "few"), "TRAIN.EPOCHS takes a int, got 'few'"),
    "bool for a number": (add("--opts", "TRAIN.EPOCHS", "True"), "TRAIN.EPOCHS takes a int, got True"),
    "model_ema": (add("--model_ema", "maybe"), "expected true or false, got 'maybe'"),
    "batch size": (add("--batch-size", "0"), "DATA.BATCH_SIZE is 0; it must be at least 1"),
    "odd batch for mixup": (add("--batch-size", "3"), "DATA.BATCH_SIZE is 3; it must be even"),
    "huge batch": (add("--batch-size", "64"), "27 training images are fewer than the 64 of one update"),
    "workers": (add("--workers", "-1"), "DATA.NUM_WORKERS is -1"),
    "epochs": (add("--epochs", "0"), "TRAIN.EPOCHS is 0"),
    "cache mode": (add("--cache-mode", "all"), "DATA.CACHE_MODE is 'all'; it must be no, full or part"),
    "accumulation": (add("--accumulation-steps", "0"), "TRAIN.ACCUMULATION_STEPS is 0"),
    "ema decay": (add("--model_ema_decay", "1.5"), "TRAIN.MODEL_EMA_DECAY is 1.5"),
    "mesa without ema": (add("--model_ema", "false"), "AUG.MESA is 1.0; it must be 0 without TRAIN.MODEL_EMA"),
    "precision": (add("--amp-dtype", "float8"), "AMP_DTYPE is 'float8'"),
    "device": (add("--device", "tpu"), "DEVICE is 'tpu'"),
    "optimiser": (add("--optim", "adamx"), "TRAIN.OPTIMIZER.NAME is 'adamx'"),
    "seed": (add("--seed", "-3"), "SEED is -3"),
    "throughput": (add("--throughput", "0"), "THROUGHPUT_BATCHES is [0]"),
    "compiled checkpointing": (add("--compile", "--use-checkpoint"), "--compile with --use-checkpoint crashes"),
    "eval without weights": (add("--eval"), "--eval needs the checkpoint"),
    "output is a file": (add("--output", "FOLDER/micro.yaml"), "cannot be written"),
    "overwriting a run": (add("--opts", "TRAIN.AUTO_RESUME", "False"), "holds a run that would be overwritten"),
    # config files
    "no config": (add("--cfg", "FOLDER/none.yaml"), "none.yaml: cannot read this config file"),
    "config is no YAML": (damage_config("a: [1"), "bad.yaml: not valid YAML"),
    "config is a list": (damage_config("- 1"), "must hold keys and values, found list"),
    "unknown section": (damage_config("TRAINING: {EPOCHS: 3}"), "unknown config key TRAINING.EPOCHS; did you mean"),
    "value of a section": (damage_config("TRAIN: 3"), "TRAIN is a section"),
    "key given twice": (
        damage_config("TRAIN: {EPOCHS: 3}\nDATA: {}\nTRAIN: {}"),
        "TRAIN is given twice, in lines 1 and 3",
    ),
    "two names of a key": (
        damage_config("AUG: {MESA: 1.0}\nTRAIN: {MESA: 2.0}"),
        "AUG.MESA and TRAIN.MESA set the same to 1.0 and 2.0",
    ),
    "another initialisation": (
        damage_config("MODEL: {SPATIALMAMBA: {DT_INIT: constant}}"),
        "DT_INIT is 'constant', but what is built here is 'random'",
    ),
    "published run as output": (published_output, "is the folder of one run of the published trainer"),
    "own base": (damage_config("BASE: [bad.yaml]"), "names itself through BASE"),
    "another model": (damage_config("MODEL: {TYPE: swin}"), "MODEL.TYPE is 'swin'"),
    "another architecture": (damage_config("MODEL: {VSSM: {SSM_RATIO: 1.0}}"), "what is built here is 2.0"),
    "another norm": (damage_config("MODEL: {VSSM: {NORM_LAYER: bn}}"), "SPATIAL_MAMBA.NORM_LAYER is 'bn'"),
    "blank value": (damage_config("TRAIN: {EPOCHS: }"), "TRAIN.EPOCHS takes a int, got None"),
    "rate that is none": (damage_config("TRAIN: {BASE_LR: .nan}"), "TRAIN.BASE_LR is nan; it must be a finite number"),
    "infinite rate": (damage_config("TRAIN: {BASE_LR: 1e999}"), "TRAIN.BASE_LR is inf; it must be a finite number"),
    "depths": (damage_config("MODEL: {VSSM: {DEPTHS: [a]}}"), "SPATIAL_MAMBA.DEPTHS is ['a']"),
    "grey images": (damage_config("MODEL: {VSSM: {IN_CHANS: 1}}"), "IN_CHANS is 1; it must be 3, for RGB"),
    "betas": (damage_config("TRAIN: {OPTIMIZER: {BETAS: [2, x]}}"), "TRAIN.OPTIMIZER.BETAS is"),
    "one beta": (damage_config("BASE: micro.yaml\nTRAIN: {OPTIMIZER: {BETAS: [0.9]}}"), "timm cannot build it"),
    "policy": (damage_config("BASE: micro.yaml\nAUG: {AUTO_AUGMENT: foo}"), "AUG.AUTO_AUGMENT is 'foo'"),
    "cutmix span": (damage_config("AUG: {CUTMIX_MINMAX: [3]}"), "AUG.CUTMIX_MINMAX is [3]"),
    "base of no name": (damage_config("BASE: 5"), "BASE takes names of YAML files, got 5"),
    "two states": (damage_config("BASE: [micro.yaml]\nMODEL: {VSSM: {SSM_D_STATE: 2}}"), "d_state must be 1, got 2"),
    "long warm-up": (damage_config("TRAIN: {WARMUP_EPOCHS: 400}"), "TRAIN.WARMUP_EPOCHS is 400"),
    "schedule": (damage_config("TRAIN: {LR_SCHEDULER: {NAME: magic}}"), "TRAIN.LR_SCHEDULER.NAME is 'magic'"),
    "image size": (damage_config("DATA: {IMG_SIZE: 16}"), "DATA.IMG_SIZE is 16"),
    "crop scale": (damage_config("AUG: {SCALE: [0.5, 2.0]}"), "AUG.SCALE is"),
    # data
    "no data path": (add("--data-path", "FOLDER/none"), "none: no such folder"),
    "no train split": (damage_data(lambda root: shutil.rmtree(root / "train")), "the train split is missing"),
    "no val split": (damage_data(lambda root: shutil.rmtree(root / "val")), "the val split is missing"),
    "empty class": (damage_data(lambda root: (root / "train/9").mkdir()), "class folder 9 holds no image"),
    "class in one split": (damage_data(lambda root: shutil.rmtree(root / "val/1")), "only one of them has 1"),
    "no images": (add("--data-path", "FOLDER/run"), "the train split is missing"),
    "no zip": (add("--zip"), "train.zip is missing"),
    "broken zip": (damage_data(break_zip), "train.zip: not a readable zip archive"),
    "broken tar": (damage_data(break_tar), "no readable images in tar"),
    "class number": (add("--opts", "MODEL.NUM_CLASSES", "5"), "has 3 classes, MODEL.NUM_CLASSES is 5"),
    "unreadable image": (damage_data(truncate_image), "unreadable image"),
    # checkpoints
    "no checkpoint": (add("--pretrained", "FOLDER/none.pth"), "none.pth: no such checkpoint file"),
    "folder as checkpoint": (add("--pretrained", "FOLDER/run"), "run: is a folder; name the checkpoint file"),
    "empty checkpoint": (damage_checkpoint(b""), "bad.pth: the file is empty"),
    "text as checkpoint": (damage_checkpoint(b"hello"), "bad.pth: not a PyTorch checkpoint"),
    "pickled nonsense": (damage_checkpoint(pickle.dumps(3)), "bad.pth"),
    "torn checkpoint": (truncate_checkpoint, "torn.pth: not a PyTorch checkpoint, or a truncated one"),
    "list as checkpoint": (damage_checkpoint([1]), "holds a list, not a checkpoint dictionary"),
    "no weights": (damage_checkpoint({"epoch": 3}), "found no model weights"),
    "other weights": (damage_checkpoint({"model": {"x": torch.zeros(1)}}), "does not fit this model"),
    "other variant": (
        other_variant,
        "other.pth: holds another model, custom (dims 8, depths 1, fusion none; 3 classes), than the one that is to",
    ),
    "other classifier": (rewrap_checkpoint, "its classifier has 7 classes, this run has 3; to train a new classifier"),
    "resume without optimiser": (drop_optimizer, "cannot resume, it holds no optimizer"),
}


@pytest.fixture(scope="module")
def wrong_place(micro: Path, photos: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copy(micro, folder / "micro.yaml")
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(trained, folder / "run" / "micro" / "default")
    return folder


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_overwrites_nothing(
    case: str, wrong_place: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    make, expected = WRONG[case]
    folder = tmp_path / "here"
    shutil.copytree(wrong_place, folder)
    arguments = ["--cfg", str(folder / "micro.yaml"), "--data-path", str(folder / "photos"), "--tag", "new"]
    more = make(folder)
    if case == "overwriting a run":
        arguments = arguments[:-2]
    before = snapshot(folder)
    status = main([*arguments, *([] if "--output" in more else ["--output", str(folder / "run")]), *more])
    error = capfd.readouterr().err.strip()
    assert status == 2
    assert error.startswith("error: ") and "\n" not in error, error
    assert expected in error
    after = snapshot(folder)
    assert {path: after[path] for path in before} == before, "nothing is overwritten"
    new = {path.name for path in after.keys() - before.keys()}
    records = {"config.yaml", "log.txt", ".lock"}  # an unreadable image is found after the run has begun
    assert not {name for name in new - records if "tfevents" not in name}


def test_an_error_of_a_loader_process_arrives_as_one_line(
    micro: Path, photos: Path, trained: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    truncate_image(broken)
    arguments = options(micro, broken, tmp_path, "--eval", "--pretrained", str(trained / BEST), "--workers", "1")
    result = subprocess.run([sys.executable, str(MAIN), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {broken / 'val' / '2'}") and "unreadable image" in line
    assert line.endswith("; replace or remove it"), "--skip-unreadable is for training"


# --- commands -------------------------------------------------------------------------------------------------------


def test_digits_are_written_once_and_whole(digits: Path, tmp_path: Path) -> None:
    shares = {}
    for split in ("train", "val"):
        classes = sorted((digits / split).iterdir())
        assert [cls.name for cls in classes] == [str(i) for i in range(10)]
        shares[split] = [len(list(cls.iterdir())) for cls in classes]
    for train, val in zip(shares["train"], shares["val"], strict=True):
        assert val / (train + val) == pytest.approx(0.2, abs=0.005), "stratified"
    image = Image.open(next((digits / "val" / "3").iterdir()))
    assert (image.size, image.mode) == ((8, 8), "L") and np.asarray(image).max() > 128
    assert write_digits(digits) == {"train": 1437, "val": 360}
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="is not the digits data set"):
        write_digits(tmp_path / "other")


@pytest.mark.parametrize(
    ("variant", "parameters", "gflops"),
    [("tiny", 26_748_862, 4.5), ("small", 43_074_280, 7.1), ("base", 95_745_592, 15.8)],
)
def test_complexity_command(variant: str, parameters: int, gflops: float, capsys: pytest.CaptureFixture) -> None:
    assert complexity.main(["--cfg", f"spatialmamba_{variant}"]) == 0
    name, size, counted, measured = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, size, counted) == (f"spatialmamba_{variant}", "224", f"{parameters:,}")
    assert float(measured) == pytest.approx(gflops, rel=0.02)


def test_wheel_works_on_its_own(tmp_path: Path) -> None:
    """Configs are inside, tests are not, and commands and shipped configs are found by name in an installed wheel."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "tests", "build", "output", "data", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"spatial_mamba/configs/classification/spatialmamba_{v}.yaml" for v in ("tiny", "small", "base")} < set(
        names
    )
    commands = {path.name for path in (ROOT / "classification" / "commands").glob("*.py")}
    assert {f"spatial_mamba/classification/commands/{name}" for name in commands} < set(names)
    assert not [name for name in names if "tests" in name]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    for arguments, expected in (
        (["spatial_mamba.classification.complexity", "--cfg", "spatialmamba_digits"], "552,337"),
        (["spatial_mamba", "--help"], "usage: python -m spatial_mamba "),
        (["spatial_mamba.checkpoint", "--help"], "usage: python -m spatial_mamba.checkpoint "),
    ):
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in result.stdout


ABLATIONS = {
    "no_fusion": "none",
    "dilations_1": "3x3 dilation 1",
    "dilations_1_3": "3x3 dilation 1, 3x3 dilation 3",
    "dilations_1_3_5_7": "3x3 dilation 1, 3x3 dilation 3, 3x3 dilation 5, 3x3 dilation 7",
    "kernel_5": "5x5 dilation 1",
    "kernel_7": "7x7 dilation 1",
}


def test_ablations_are_configs() -> None:
    folder = CONFIG_FOLDER / "ablations"
    assert {path.stem.removeprefix("spatialmamba_tiny_") for path in folder.iterdir()} == set(ABLATIONS)
    for name, fusion in ABLATIONS.items():
        config, _ = load_config(f"ablations/spatialmamba_tiny_{name}")
        with torch.device("meta"):
            architecture = architecture_of(build_model(config, 1000).state_dict())
        assert (architecture.fusion, architecture.depths) == (fusion, (2, 4, 8, 4))
        assert f"spatialmamba_tiny_{name}" == config.MODEL.NAME and config.AUG.MESA == 1.0
    for value, message in (("[0]", "fusion_dilations must be positive"), ("['a']", "must be a list of whole numbers")):
        with pytest.raises(InputError, match=message):
            config, _ = load_config("spatialmamba_tiny", [("MODEL.SPATIAL_MAMBA.FUSION_DILATIONS", value)])
            build_model(config, 10)
