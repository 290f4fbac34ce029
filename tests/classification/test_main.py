"""Wrong input to the trainer: one line, exit status 2, and nothing is overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.checkpoint import BEST
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .runs import options


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


def other_weights(folder: Path) -> list[str]:
    torch.save({"model": {"x": torch.zeros(1)}}, folder / "bad.pth")
    return ["--pretrained", str(folder / "bad.pth")]


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
        "config spatialmamba_tny: no such file or shipped config; did you mean spatialmamba_tiny?",
    ),
    "unknown opts key": (add("--opts", "TRAIN.EPOCH", "3"), "unknown config key TRAIN.EPOCH; did you mean"),
    "section as opts key": (add("--opts", "TRAIN", "3"), "TRAIN is a section"),
    "wrong opts type": (add("--opts", "TRAIN.EPOCHS", "few"), "TRAIN.EPOCHS takes a whole number, got 'few'"),
    "bool for a number": (add("--opts", "TRAIN.EPOCHS", "True"), "TRAIN.EPOCHS takes a whole number, got True"),
    "model_ema": (add("--model_ema", "maybe"), "expected true or false, got 'maybe'"),
    "batch size": (add("--batch-size", "0"), "DATA.BATCH_SIZE is 0; it must be 1 to 1,000,000"),
    "one image for BatchNorm": (
        add("--batch-size", "1", "--opts", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"),
        "DATA.BATCH_SIZE is 1; it must be above 1, because the last BatchNorm gets one pixel per image",
    ),
    "odd batch for mixup": (add("--batch-size", "3"), "DATA.BATCH_SIZE is 3; it must be even"),
    "huge batch": (add("--batch-size", "64"), "27 training images are fewer than the 64 of one update"),
    "workers": (add("--workers", "-1"), "DATA.NUM_WORKERS is -1"),
    "epochs": (add("--epochs", "0"), "TRAIN.EPOCHS is 0"),
    "cache mode": (add("--cache-mode", "all"), "DATA.CACHE_MODE is 'all'; it must be one of no, full, part"),
    "accumulation": (add("--accumulation-steps", "0"), "TRAIN.ACCUMULATION_STEPS is 0"),
    "timeout": (add("--timeout-minutes", "1e300"), "TIMEOUT_MINUTES is 1e+300; it must be above 0"),
    "ema decay": (add("--model_ema_decay", "1.5"), "TRAIN.MODEL_EMA_DECAY is 1.5"),
    "mesa without ema": (add("--model_ema", "false"), "AUG.MESA is 1.0; it must be 0 without TRAIN.MODEL_EMA"),
    "precision": (add("--amp-dtype", "float8"), "AMP_DTYPE is 'float8'"),
    "device": (add("--device", "tpu"), "DEVICE is 'tpu'"),
    "optimiser": (add("--optim", "adamx"), "TRAIN.OPTIMIZER.NAME is 'adamx'"),
    "seed": (add("--seed", "-3"), "SEED is -3"),
    "throughput": (add("--throughput", "0"), "THROUGHPUT_BATCHES is [0]"),
    "compiled checkpointing": (add("--compile", "--use-checkpoint"), "--compile with --use-checkpoint crashes"),
    "eval without weights": (add("--eval"), "no checkpoint to evaluate"),
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
        "AUG.MESA and TRAIN.MESA set the same key to 1.0 and 2.0",
    ),
    "another initialisation": (
        damage_config("MODEL: {SPATIALMAMBA: {DT_INIT: constant}}"),
        "DT_INIT is 'constant'; only 'random' is supported",
    ),
    "published run as output": (published_output, "is the folder of one run of the published trainer"),
    "own base": (damage_config("BASE: [bad.yaml]"), "includes itself through BASE"),
    "another model": (damage_config("MODEL: {TYPE: swin}"), "MODEL.TYPE is 'swin'"),
    "another architecture": (damage_config("MODEL: {VSSM: {SSM_RATIO: 1.0}}"), "only 2.0 is supported"),
    "another norm": (damage_config("MODEL: {VSSM: {NORM_LAYER: bn}}"), "SPATIAL_MAMBA.NORM_LAYER is 'bn'"),
    "blank value": (damage_config("TRAIN: {EPOCHS: }"), "TRAIN.EPOCHS takes a whole number, got None"),
    "rate that is none": (damage_config("TRAIN: {BASE_LR: .nan}"), "TRAIN.BASE_LR is nan; it must be a finite number"),
    "infinite rate": (damage_config("TRAIN: {BASE_LR: 1e999}"), "TRAIN.BASE_LR is inf; it must be a finite number"),
    "depths": (damage_config("MODEL: {VSSM: {DEPTHS: [a]}}"), "SPATIAL_MAMBA.DEPTHS is ['a']"),
    "grey images": (damage_config("MODEL: {VSSM: {IN_CHANS: 1}}"), "IN_CHANS is 1; it must be 3, for RGB"),
    "betas": (damage_config("TRAIN: {OPTIMIZER: {BETAS: [2, x]}}"), "TRAIN.OPTIMIZER.BETAS is"),
    "one beta": (
        damage_config("BASE: micro.yaml\nTRAIN: {OPTIMIZER: {BETAS: [0.9]}}"),
        "it takes 2 numbers as TRAIN.OPTIMIZER.BETAS",
    ),
    "policy": (damage_config("BASE: micro.yaml\nAUG: {AUTO_AUGMENT: foo}"), "AUG.AUTO_AUGMENT is 'foo'"),
    "part of a policy": (add("--opts", "AUG.AUTO_AUGMENT", "rand-foo9"), "AUG.AUTO_AUGMENT is 'rand-foo9', which"),
    "optimiser of second order": (add("--optim", "adahessian"), "'adahessian': it cannot be used (it needs second"),
    "other number of betas": (add("--optim", "adan"), "it takes 3 numbers as TRAIN.OPTIMIZER.BETAS"),
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
    "broken tar": (damage_data(break_tar), "not a readable tar archive"),
    "class number": (add("--opts", "MODEL.NUM_CLASSES", "5"), "has 3 classes, but MODEL.NUM_CLASSES is 5"),
    "unreadable image": (damage_data(truncate_image), "unreadable image"),
    # checkpoints; test_weights has the files that cannot be read
    "no checkpoint": (add("--pretrained", "FOLDER/none.pth"), "none.pth: no such checkpoint file"),
    "other weights": (other_weights, "does not fit this model"),
    "other variant": (
        other_variant,
        "other.pth: holds another model, custom (dims 8, depths 1, fusion none; 3 classes), instead of ",
    ),
    "other classifier": (rewrap_checkpoint, "its classifier has 7 classes, but this run has 3; to train a new"),
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
    records = {"config.yaml", "log.txt", ".lock"}  # an unreadable image is only found once the run has started
    assert not {name for name in new - records if "tfevents" not in name}


def test_an_error_in_a_loader_process_is_one_line(
    micro: Path, photos: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    truncate_image(broken)
    arguments = options(micro, broken, tmp_path, "--eval", "--pretrained", str(trained / BEST), "--workers", "1")
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {broken / 'val' / '2'}") and "unreadable image" in line
    assert line.endswith("; replace or remove it"), "--skip-unreadable is for training"


def test_a_process_that_never_starts_is_one_error(
    micro: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = str(get_free_port())
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(options(micro, photos, tmp_path, "--timeout-minutes", "0.01")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process 0: another process failed, was killed or does not answer; see its output")
