"""Configs and checkpoints, laid out as the published trainer writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from spatial_mamba.classification.checkpoint import LATEST


def published_yaml(variant: str) -> dict[str, Any]:
    """All keys of a published YAML file."""
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


def published_run(config: dict[str, Any], images_per_update: int = 1024) -> dict[str, Any]:
    """The ``config.json`` of the published trainer: all its settings, with scaled learning rates."""
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


def published_checkpoint(trained: Path, path: Path) -> Path:
    """Our checkpoint in the layout of the published trainer: scaled rates, steps 0, a misspelt key."""
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
    # There, the group with weight decay comes first, and parameters are numbered in that order.
    spared, decayed = content["optimizer"]["param_groups"]
    order = decayed["params"] + spared["params"]
    content["optimizer"]["state"] = {i: content["optimizer"]["state"][old] for i, old in enumerate(order)}
    decayed["params"] = list(range(len(decayed["params"])))
    spared["params"] = list(range(len(decayed["params"]), len(order)))
    content["optimizer"]["param_groups"] = [decayed, spared]
    del content["skipped_in_a_row"]
    torch.save(content, path)
    return path
