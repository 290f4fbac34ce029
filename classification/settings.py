"""All config keys in one table: default (the ImageNet recipe), allowed values, meaning and command-line option."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from .models.preprocessing import INTERPOLATIONS, LARGEST_SIZE, SMALLEST_SIZE


@dataclass(frozen=True)
class Allowed:
    """A test of values, and a description of the values that pass, worded to follow "must be"."""

    test: Callable[[Any], bool]
    text: str


def at_least(smallest: int) -> Allowed:
    return Allowed(lambda value: value >= smallest, f"at least {smallest}")


def within(smallest: int, largest: int) -> Allowed:
    return Allowed(lambda value: smallest <= value <= largest, f"{smallest} to {largest:,}")


def one_of(*values: str) -> Allowed:
    return Allowed(lambda value: value in values, f"one of {', '.join(values)}")


def _are(values: Any, kind: type[float] | tuple[type[float], ...] = (int, float)) -> bool:
    """Whether all entries of a list are finite numbers of a kind; an empty list passes."""
    return isinstance(values, list | tuple) and all(
        isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def _rising(pair: Any, lowest: float, highest: float = math.inf) -> bool:
    return _are(pair) and len(pair) == 2 and lowest <= pair[0] <= pair[1] <= highest


ANY = Allowed(lambda value: True, "")
FINITE = Allowed(lambda value: not isinstance(value, float) or math.isfinite(value), "a finite number")
BELOW_ONE = Allowed(lambda value: 0 <= value < 1, "in [0, 1)")
PROBABILITY = Allowed(lambda value: 0 <= value <= 1, "a probability in [0, 1]")
WHOLE_NUMBERS = Allowed(lambda value: _are(value, int), "a list of whole numbers")
SOME_WHOLE_NUMBERS = Allowed(lambda value: _are(value, int) and len(value) > 0, "a list of at least one whole number")
DEPTHS = Allowed(
    lambda value: SOME_WHOLE_NUMBERS.test(value) and len(value) <= 16 and max(value) <= 1000,
    "a list of 1 to 16 whole numbers up to 1000",
)
BATCHES = Allowed(lambda value: _are(value, int) and all(size >= 1 for size in value), "positive batch sizes")
BETAS = Allowed(lambda value: _are(value) and all(0 <= beta < 1 for beta in value), "numbers in [0, 1)")
AREA = Allowed(lambda value: _rising(value, 1e-9, 1.0), "two rising positive numbers, at most the whole image, 1.0")
RATIO = Allowed(lambda value: _rising(value, 1e-9), "two rising positive numbers")
SPAN = Allowed(
    lambda value: value is None or (_rising(value, 0.0, 1.0) and value[0] < value[1]),
    "None, or two rising numbers in [0, 1]",
)
MODEL_TYPE = Allowed(
    lambda value: value.lower() in ("spatial_mamba", "spatialmamba", "vssm"), "one of spatial_mamba, spatialmamba, vssm"
)


@dataclass(frozen=True)
class Setting:
    """A key of the config.

    Attributes:
        key: sections and name, with dots.
        default: also decides the type.
        allowed: the values that can work, whatever the other keys are; ``check_config`` tests keys together.
        help: meaning and unit.
        option: its options on the command line, if any, separated by spaces.
        metavar: of the option, if its name is not enough.
    """

    key: str
    default: Any
    allowed: Allowed = ANY
    help: str = ""
    option: str = ""
    metavar: str | None = None


SETTINGS = (
    Setting("DATA.DATA_PATH", "", ANY, "folder with the train and val splits", "--data-path", "FOLDER"),
    Setting("DATA.BATCH_SIZE", 128, within(1, 10**6), "images per process and step", "--batch-size", "N"),
    Setting("DATA.IMG_SIZE", 224, within(SMALLEST_SIZE, LARGEST_SIZE), "side of the images in pixels"),
    Setting("DATA.INTERPOLATION", "bicubic", one_of(*INTERPOLATIONS, "random"), "of resized images"),
    Setting("DATA.ZIP_MODE", False, ANY, "read train.zip and val.zip, even next to folders", "--zip"),
    Setting(
        "DATA.CACHE_MODE", "part", one_of("no", "full", "part"),
        "encoded images kept in memory: no, full, or part (of a zip, per process)", "--cache-mode", "MODE",
    ),
    Setting("DATA.PIN_MEMORY", True, ANY, "load batches into pinned memory"),
    Setting("DATA.NUM_WORKERS", 8, within(0, 1024), "loader processes per training process", "--workers", "N"),
    Setting(
        "DATA.SKIP_UNREADABLE", False, ANY, "replace a damaged training image with the next one, and count it",
        "--skip-unreadable",
    ),
    Setting("DATA.EXIF_ORIENTATION", False, ANY, "rotate images by their EXIF data; off for published accuracies"),

    Setting("MODEL.TYPE", "spatial_mamba", MODEL_TYPE, "kind of model"),
    Setting("MODEL.NAME", "spatialmamba_tiny", ANY, "name of the output folder"),
    Setting("MODEL.PRETRAINED", "", ANY, "start from these weights, evaluated first", "--pretrained", "FILE"),
    Setting("MODEL.RESUME", "", ANY, "continue from this checkpoint", "--resume", "FILE"),
    Setting("MODEL.FINETUNE", False, ANY, "allow a new classifier on the pretrained weights", "--finetune"),
    Setting("MODEL.NUM_CLASSES", 0, within(0, 10**6), "0: as in the data set; any other number must agree with it"),
    Setting("MODEL.DROP_RATE", 0.0, BELOW_ONE, "dropout of the classifier"),
    Setting("MODEL.DROP_PATH_RATE", 0.2, BELOW_ONE, "drop path of the last block"),
    Setting("MODEL.LABEL_SMOOTHING", 0.1, BELOW_ONE),
    Setting("MODEL.SPATIAL_MAMBA.IN_CHANS", 3, within(1, 1024), "channels of the images"),
    Setting("MODEL.SPATIAL_MAMBA.EMBED_DIM", 64, within(1, 2**12), "width of the first stage"),
    Setting("MODEL.SPATIAL_MAMBA.DEPTHS", [2, 4, 8, 4], DEPTHS, "blocks per stage"),
    Setting("MODEL.SPATIAL_MAMBA.D_STATE", 1, ANY, "state size"),
    Setting("MODEL.SPATIAL_MAMBA.MLP_RATIO", 4.0, within(0, 64), "hidden width of the MLP, in stage widths"),
    Setting("MODEL.SPATIAL_MAMBA.FUSION_DILATIONS", [1, 3, 5], WHOLE_NUMBERS, "empty: no fusion, a plain scan"),
    Setting("MODEL.SPATIAL_MAMBA.FUSION_KERNEL_SIZES", [3], SOME_WHOLE_NUMBERS, "one for all dilations, or one each"),

    Setting("TRAIN.EPOCHS", 300, within(1, 10**6), "", "--epochs", "N"),
    Setting("TRAIN.WARMUP_EPOCHS", 20, at_least(0), "epochs of linear warm-up"),
    Setting("TRAIN.WEIGHT_DECAY", 0.05, at_least(0), "except on biases and 1-D parameters"),
    Setting("TRAIN.SCALE_LR", True, ANY, "multiply the next three rates by (images per update) / 512"),
    Setting("TRAIN.BASE_LR", 5e-4, at_least(0), "highest learning rate"),
    Setting("TRAIN.WARMUP_LR", 5e-7, at_least(0), "learning rate at the start of the warm-up"),
    Setting("TRAIN.MIN_LR", 5e-6, at_least(0), "lowest learning rate after the warm-up"),
    Setting("TRAIN.CLIP_GRAD", 5.0, at_least(0), "largest gradient norm; 0: no clipping"),
    Setting("TRAIN.AUTO_RESUME", True, ANY, "continue the run that the output folder holds"),
    Setting(
        "TRAIN.ACCUMULATION_STEPS", 1, within(1, 10**6), "steps whose gradients make one update",
        "--accumulation-steps", "N",
    ),
    Setting("TRAIN.USE_CHECKPOINT", False, ANY, "recompute activations in the backward pass", "--use-checkpoint"),
    Setting("TRAIN.MODEL_EMA", True, ANY, "average the weights over the updates", "--model_ema --model-ema", "BOOL"),
    Setting("TRAIN.MODEL_EMA_DECAY", 0.9999, BELOW_ONE, "per update", "--model_ema_decay --model-ema-decay", "D"),
    Setting("TRAIN.MAX_SKIPPED_UPDATES", 25, at_least(1), "consecutive non-finite updates that end the run"),
    Setting("TRAIN.LR_SCHEDULER.NAME", "cosine", one_of("cosine", "linear", "step", "multistep", "constant")),
    Setting("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30, at_least(1), "of step"),
    Setting("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, ANY, "of step"),
    Setting("TRAIN.LR_SCHEDULER.MULTISTEPS", [], Allowed(WHOLE_NUMBERS.test, "a list of epochs"), "of multistep"),
    Setting("TRAIN.LR_SCHEDULER.GAMMA", 0.1, ANY, "decay rate of multistep"),
    Setting("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", True, ANY, "the cosine starts after the warm-up, not at 0"),
    Setting("TRAIN.OPTIMIZER.NAME", "adamw", ANY, "optimiser, by timm's name", "--optim", "NAME"),
    Setting("TRAIN.OPTIMIZER.EPS", 1e-8),
    Setting("TRAIN.OPTIMIZER.BETAS", (0.9, 0.999), BETAS),
    Setting("TRAIN.OPTIMIZER.MOMENTUM", 0.9),

    Setting("AUG.COLOR_JITTER", 0.4, at_least(0), "only without AUG.AUTO_AUGMENT"),
    Setting("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", ANY, "policy, in timm's notation"),
    Setting("AUG.REPROB", 0.25, PROBABILITY, "of random erasing"),
    Setting("AUG.REMODE", "pixel", one_of("pixel", "rand", "const"), "content of erased pixels"),
    Setting("AUG.RECOUNT", 1, at_least(1), "erased rectangles per image"),
    Setting("AUG.SCALE", (0.08, 1.0), AREA, "area of the random crop"),
    Setting("AUG.RATIO", (3 / 4, 4 / 3), RATIO, "aspect ratio of the random crop"),
    Setting("AUG.HFLIP", 0.5, PROBABILITY, "of a horizontal flip"),
    Setting("AUG.MIXUP", 0.8, at_least(0), "alpha; 0: off"),
    Setting("AUG.CUTMIX", 1.0, at_least(0), "alpha; 0: off"),
    Setting("AUG.CUTMIX_MINMAX", None, SPAN, "sides of the patch, instead of AUG.CUTMIX"),
    Setting("AUG.MIXUP_PROB", 1.0, PROBABILITY, "of Mixup or CutMix"),
    Setting("AUG.MIXUP_SWITCH_PROB", 0.5, PROBABILITY, "of CutMix if both are on"),
    Setting("AUG.MIXUP_MODE", "batch", one_of("batch", "pair", "elem"), "what shares a mixing factor"),
    Setting("AUG.MESA", 0.0, at_least(0), "gain of the soft cross entropy against the EMA model; 0: off"),
    Setting("AUG.MESA_START", 0.25, Allowed(PROBABILITY.test, "in [0, 1]"), "fraction of the epochs before it starts"),

    Setting("TEST.CROP", True, ANY, "resize the short side to 256/224 of the size and crop, else squash to the size"),
    Setting("AMP_ENABLE", True, ANY, "train in mixed precision"),
    Setting(
        "AMP_DTYPE", "auto", one_of("auto", "bfloat16", "float16"),
        "auto: bfloat16 if the device supports it, else float16 on a GPU and float32 on a CPU", "--amp-dtype", "DTYPE",
    ),
    Setting("DEVICE", "auto", one_of("auto", "cpu", "cuda"), "auto: a GPU if there is one", "--device", "DEVICE"),
    Setting("DETERMINISTIC", False, ANY, "give the same bits every time, with one thread; slower", "--deterministic"),
    Setting(
        "TIMEOUT_MINUTES", 10.0, Allowed(lambda value: 0 < value <= 10**5, "above 0, and at most 100,000"),
        "end a run of several processes if none makes progress for this long", "--timeout-minutes", "M",
    ),
    Setting("COMPILE", False, ANY, "torch.compile the model", "--compile"),
    Setting("OUTPUT", "output", ANY, "root of the results: OUTPUT/MODEL.NAME/TAG", "--output", "FOLDER"),
    Setting("TAG", "default", ANY, "name of this run", "--tag", "NAME"),
    Setting("SAVE_FREQ", 1, at_least(1), "epochs between checkpoints"),
    Setting(
        "KEEP_CHECKPOINTS", 1, at_least(1), "newest checkpoints kept: latest.pth alone, or also as update_NUMBER.pth",
        "--keep-checkpoints", "K",
    ),
    Setting("SAVE_MINUTES", 0.0, at_least(0), "minutes between saves within an epoch; 0: none", "--save-minutes", "M"),
    Setting("PRINT_FREQ", 50, at_least(1), "updates between log lines if there is no progress bar"),
    Setting("SEED", 0, within(0, 2**63), "of weights, order and augmentation", "--seed", "N"),
    Setting("EVAL_MODE", False, ANY, "evaluate the weights of --pretrained or --resume and stop", "--eval"),
    Setting("THROUGHPUT_MODE", False, ANY, "time inference and stop"),
    Setting("THROUGHPUT_BATCHES", [], BATCHES, "batch sizes to time; empty: DATA.BATCH_SIZE"),
)  # fmt: skip


def default_config() -> CfgNode:
    """A new config of the defaults."""
    config = CfgNode()
    for setting in SETTINGS:
        *sections, name = setting.key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = list(setting.default) if isinstance(setting.default, list) else setting.default
    return config


def settings_table() -> str:
    """The table as text: key, default, allowed values, option and meaning, in columns."""
    rows = [("key", "default", "option", "meaning")]
    for setting in SETTINGS:
        meaning = "; must be ".join(filter(None, (setting.help, setting.allowed.text)))
        rows.append((setting.key, str(setting.default), setting.option.split(" ")[0], meaning))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join((*map(str.ljust, row[:3], widths), row[3])) for row in rows)
