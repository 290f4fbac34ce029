"""Configs: shipped ones, published ones, ablations."""

from pathlib import Path

import pytest
import torch
import yaml

from spatial_mamba.classification.config import CONFIG_FOLDER, leaves, load_config
from spatial_mamba.classification.data import build_transform
from spatial_mamba.classification.models.architecture import architecture_of
from spatial_mamba.classification.optim import build_optimizer
from spatial_mamba.classification.trainer import build_model
from spatial_mamba.kernels.errors import UserError

from .published import published_run, published_yaml


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_shipped_config_is_the_published_recipe(variant: str) -> None:
    """In what the published YAML files leave to the defaults."""
    config, notes = load_config(f"spatialmamba_{variant}")
    assert not notes
    assert (config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE) == (1000, 224, 128)
    train, aug = config.TRAIN, config.AUG
    assert (train.EPOCHS, train.WARMUP_EPOCHS, train.CLIP_GRAD, train.WEIGHT_DECAY) == (300, 20, 5.0, 0.05)
    assert (train.MODEL_EMA, train.MODEL_EMA_DECAY, aug.MESA_START) == (True, 0.9999, 0.25)
    assert (aug.MIXUP, aug.CUTMIX, aug.MIXUP_SWITCH_PROB, config.MODEL.LABEL_SMOOTHING) == (0.8, 1.0, 0.5, 0.1)
    transforms = repr(build_transform(config, is_training=True))
    assert "RandomResizedCrop" in transforms and "RandAugment" in transforms and "RandomErasing" in transforms
    resize, crop, *_ = build_transform(config, is_training=False).transforms
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_published_yaml_is_the_shipped_config(variant: str, tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(published_yaml(variant)))
    config, notes = load_config(tmp_path / "published.yaml")
    assert [note.split(": ")[1] for note in notes] == ["MODEL.DDP has no effect here"]
    shipped, _ = load_config(f"spatialmamba_{variant}")
    differing = {key for key, value in leaves(config) if dict(leaves(shipped))[key] != value}
    assert differing == {"MODEL.NAME", "MODEL.NUM_CLASSES"}  # the published default is 1000; here the data set decides


def test_a_published_runs_config_keeps_its_learning_rates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(yaml.safe_dump(published_run(published_yaml("small"))))
    config, notes = load_config(tmp_path / "config.json", [("DATA.BATCH_SIZE", 64)])
    assert any("learning rates are used as they are" in note for note in notes)
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


def test_yaml_with_the_keys_of_vmamba_loads(tmp_path: Path) -> None:
    """Configs with VMamba's keys, which derived projects use."""
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
    for value, message in (
        ("[0]", "fusion_dilations must be integers"),
        ("['a']", "must be a list of whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            config, _ = load_config("spatialmamba_tiny", [("MODEL.SPATIAL_MAMBA.FUSION_DILATIONS", value)])
            build_model(config, 10)
