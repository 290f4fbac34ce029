"""The trainer's configuration: defaults (the ImageNet recipe), YAML files, command-line overrides and their checks."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from .errors import InputError
from .models.home import with_home
from .models.preprocessing import INTERPOLATIONS, SMALLEST_SIZE

CONFIG_FOLDER = Path(__file__).parents[1] / "configs" / "classification"

_C = CfgNode()
_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and step
_C.DATA.DATA_PATH = ""
_C.DATA.IMG_SIZE = 224
_C.DATA.INTERPOLATION = "bicubic"
_C.DATA.ZIP_MODE = False  # read train.zip and val.zip, even where folders are there too
_C.DATA.CACHE_MODE = "part"  # encoded images kept in memory: no, full, or part: each process its fraction of a zip
_C.DATA.PIN_MEMORY = True
_C.DATA.NUM_WORKERS = 8
_C.DATA.SKIP_UNREADABLE = False  # in training, take the next image instead and count
_C.DATA.EXIF_ORIENTATION = False  # turn images as their EXIF data say; the published accuracies are without

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "spatial_mamba"
_C.MODEL.NAME = "spatialmamba_tiny"  # names the output folder
_C.MODEL.PRETRAINED = ""
_C.MODEL.RESUME = ""
_C.MODEL.FINETUNE = False  # allow a pretrained classifier for other classes to be dropped
_C.MODEL.NUM_CLASSES = 0  # 0: as many as the data set has; else it must have that many
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.2
_C.MODEL.LABEL_SMOOTHING = 0.1

_C.MODEL.SPATIAL_MAMBA = CfgNode()
_C.MODEL.SPATIAL_MAMBA.IN_CHANS = 3
_C.MODEL.SPATIAL_MAMBA.EMBED_DIM = 64
_C.MODEL.SPATIAL_MAMBA.DEPTHS = [2, 4, 8, 4]
_C.MODEL.SPATIAL_MAMBA.D_STATE = 1
_C.MODEL.SPATIAL_MAMBA.MLP_RATIO = 4.0
_C.MODEL.SPATIAL_MAMBA.FUSION_DILATIONS = [1, 3, 5]  # empty: no fusion, a plain scan
_C.MODEL.SPATIAL_MAMBA.FUSION_KERNEL_SIZES = [3]  # one for all dilations, or one each

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.SCALE_LR = True  # multiply the next three by (images per update) / 512; else they are taken as they are
_C.TRAIN.BASE_LR = 5e-4
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 does not clip
_C.TRAIN.AUTO_RESUME = True
_C.TRAIN.ACCUMULATION_STEPS = 1
_C.TRAIN.USE_CHECKPOINT = False
_C.TRAIN.MODEL_EMA = True
_C.TRAIN.MODEL_EMA_DECAY = 0.9999
_C.TRAIN.MAX_SKIPPED_UPDATES = 25  # consecutive updates lost to non-finite values before the run stops

_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1  # decay rate of multistep
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True  # cosine decays after the warm-up instead of under it

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
_C.AUG.REPROB = 0.25
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
_C.AUG.SCALE = (0.08, 1.0)  # area of the random crop
_C.AUG.RATIO = (3 / 4, 4 / 3)
_C.AUG.HFLIP = 0.5
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
_C.AUG.CUTMIX_MINMAX = None
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = "batch"
_C.AUG.MESA = 0.0  # gain of the soft cross entropy against the EMA model
_C.AUG.MESA_START = 0.25  # share of the epochs before it sets in

_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize the short side to 256/224 of the size and crop, else squash to the size

_C.AMP_ENABLE = True
_C.AMP_DTYPE = "auto"  # bfloat16 where the device has it, else float16; or bfloat16, float16
_C.DEVICE = "auto"
_C.COMPILE = False
_C.OUTPUT = "output"
_C.TAG = "default"
_C.SAVE_FREQ = 1  # epochs between checkpoints
_C.PRINT_FREQ = 50  # steps between lines where there is no progress bar
_C.SEED = 0
_C.EVAL_MODE = False
_C.THROUGHPUT_MODE = False
_C.THROUGHPUT_BATCHES = []  # batch sizes to time; empty: DATA.BATCH_SIZE

MODEL_TYPES = ("spatial_mamba", "spatialmamba", "vssm")
_MODEL_SECTIONS = ("SPATIALMAMBA", "VSSM")  # other names of MODEL.SPATIAL_MAMBA, in any case

# Keys of published files that change no result, or choose between implementations of the same. They are ignored, with
# a note in the log.
_UNUSED_KEYS = {
    "ENABLE_AMP", "FUSED_LAYERNORM", "FUSED_WINDOW_PROCESS", "LOCAL_RANK", "TRAINCOST_MODE",
    "DATA.DATASET", "DATA.MASK_PATCH_SIZE", "DATA.MASK_RATIO", "DATA.PERSISTENT_WORKERS", "MODEL.DDP", "MODEL.MMCKPT",
    "TEST.SEQUENTIAL", "TEST.SHUFFLE", "TRAIN.MOE", "TRAIN.START_EPOCH",
    *(f"MODEL.SPATIAL_MAMBA.{key}" for key in (
        "IMAGE_SIZE", "SSM_CONV_BIAS", "SSM_DT_RANK", "SSM_INIT", "SSM_FORWARDTYPE", "SSM_RANK_RATIO", "PATCH_NORM",
        "DOWNSAMPLE", "PATCHEMBED",
    )),
}  # fmt: skip
# Keys of published files whose value must be the one that is built in.
_FIXED_KEYS = {
    "AMP_OPT_LEVEL": ("", "O1"),
    "TRAIN.LAYER_DECAY": (1.0,),
    "MODEL.SPATIAL_MAMBA.DT_INIT": ("random",),
    "MODEL.SPATIAL_MAMBA.SSM_RATIO": (2.0,),
    "MODEL.SPATIAL_MAMBA.SSM_CONV": (3,),
    "MODEL.SPATIAL_MAMBA.SSM_ACT_LAYER": ("silu",),
    "MODEL.SPATIAL_MAMBA.SSM_DROP_RATE": (0.0,),
    "MODEL.SPATIAL_MAMBA.MLP_ACT_LAYER": ("gelu",),
    "MODEL.SPATIAL_MAMBA.MLP_DROP_RATE": (0.0,),
    "MODEL.SPATIAL_MAMBA.NORM_LAYER": ("ln", "ln2d"),
    "MODEL.SPATIAL_MAMBA.PATCH_SIZE": (4,),
    "MODEL.SPATIAL_MAMBA.POSEMBED": (False,),
    "MODEL.SPATIAL_MAMBA.GMLP": (False,),
}
RATES = ("TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR")
_RENAMED_KEYS = {
    "MODEL.SPATIAL_MAMBA.SSM_D_STATE": "MODEL.SPATIAL_MAMBA.D_STATE",
    "TRAIN.MESA": "AUG.MESA",  # -1.0 is off
}


def default_config() -> CfgNode:
    """A fresh copy of the defaults."""
    return _C.clone()


def load_config(name: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> tuple[CfgNode, list[str]]:
    """Defaults, then a YAML file (and those its BASE names), then ``(key, value)`` overrides; checked and frozen.

    Args:
        name: path of the file, or the bare name of one that comes with the package.
        overrides: later ones win; texts are read as YAML users expect (``1e-3`` is a number).

    Returns:
        The config, and one line for every key that has no effect or another meaning.

    Raises:
        InputError: naming the file or option and the key.
    """
    config, notes = default_config(), []
    path, shipped = Path(with_home(str(name))), CONFIG_FOLDER / f"{name}.yaml"
    if not path.suffix and not path.exists() and not shipped.is_file():
        names = [file.stem for file in CONFIG_FOLDER.glob("*.yaml")]
        raise InputError(f"--cfg {name}: no such file, and no config of the package{_closest(str(name), names)}")
    _merge_file(config, shipped if not path.exists() and shipped.is_file() else path, notes, seen=())
    for key, value in overrides:
        _merge_value(config, *_meaning_of(key, value), "command line", notes)
    config.OUTPUT, config.DATA.DATA_PATH = with_home((config.OUTPUT, config.DATA.DATA_PATH))
    config.MODEL.PRETRAINED, config.MODEL.RESUME = with_home((config.MODEL.PRETRAINED, config.MODEL.RESUME))
    check_config(config)
    config.freeze()
    return config, notes


def check_config(config: CfgNode) -> None:
    """Refuse values that cannot work before anything is built from them.

    Raises:
        InputError: naming the key, its value and what is allowed.
    """

    def require(key: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = config
            for part in key.split("."):
                value = value[part]
            raise InputError(f"{key} is {value!r}; it must be {allowed}")

    def are_numbers(values: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
        return isinstance(values, list | tuple) and all(
            isinstance(v, kind) and not isinstance(v, bool) and math.isfinite(v) for v in values
        )

    for key, value in leaves(config):
        require(key, not isinstance(value, float) or math.isfinite(value), "a finite number")
    data, model, train, aug = config.DATA, config.MODEL, config.TRAIN, config.AUG
    network, trains = model.SPATIAL_MAMBA, not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    require("MODEL.TYPE", model.TYPE.lower() in MODEL_TYPES, f"one of {', '.join(MODEL_TYPES)}")
    require("DATA.BATCH_SIZE", data.BATCH_SIZE >= 1, "at least 1")
    require("DATA.IMG_SIZE", data.IMG_SIZE >= SMALLEST_SIZE, f"at least {SMALLEST_SIZE}")
    require("DATA.NUM_WORKERS", data.NUM_WORKERS >= 0, "at least 0")
    require("DATA.CACHE_MODE", data.CACHE_MODE in ("no", "full", "part"), "no, full or part")
    interpolations = (*INTERPOLATIONS, "random")
    require("DATA.INTERPOLATION", data.INTERPOLATION in interpolations, f"one of {', '.join(interpolations)}")
    require("MODEL.SPATIAL_MAMBA.IN_CHANS", network.IN_CHANS == 3 or config.THROUGHPUT_MODE, "3, for RGB images")
    require("MODEL.SPATIAL_MAMBA.IN_CHANS", network.IN_CHANS >= 1, "at least 1")
    depths = network.DEPTHS
    require("MODEL.SPATIAL_MAMBA.DEPTHS", are_numbers(depths, int) and len(depths) > 0, "a list of whole numbers")
    for key in ("FUSION_DILATIONS", "FUSION_KERNEL_SIZES"):
        require(f"MODEL.SPATIAL_MAMBA.{key}", are_numbers(network[key], int), "a list of whole numbers")
    require("MODEL.SPATIAL_MAMBA.FUSION_KERNEL_SIZES", len(network.FUSION_KERNEL_SIZES) > 0, "a list of at least one")
    require("MODEL.SPATIAL_MAMBA.MLP_RATIO", network.MLP_RATIO * network.EMBED_DIM >= 1, "a positive number")
    require("MODEL.NUM_CLASSES", model.NUM_CLASSES >= 0, "0 (as the data set) or a number of classes")
    require("MODEL.DROP_RATE", 0 <= model.DROP_RATE < 1, "in [0, 1)")
    require("MODEL.DROP_PATH_RATE", 0 <= model.DROP_PATH_RATE < 1, "in [0, 1)")
    require("MODEL.LABEL_SMOOTHING", 0 <= model.LABEL_SMOOTHING < 1, "in [0, 1)")
    require("TRAIN.EPOCHS", train.EPOCHS >= 1, "at least 1")
    require("TRAIN.WARMUP_EPOCHS", 0 <= train.WARMUP_EPOCHS < train.EPOCHS, f"less than TRAIN.EPOCHS, {train.EPOCHS}")
    for key in ("BASE_LR", "WARMUP_LR", "MIN_LR", "WEIGHT_DECAY", "CLIP_GRAD"):
        require(f"TRAIN.{key}", train[key] >= 0, "at least 0")
    require("TRAIN.ACCUMULATION_STEPS", train.ACCUMULATION_STEPS >= 1, "at least 1")
    require("TRAIN.MODEL_EMA_DECAY", 0 <= train.MODEL_EMA_DECAY < 1, "in [0, 1)")
    require("TRAIN.MAX_SKIPPED_UPDATES", train.MAX_SKIPPED_UPDATES >= 1, "at least 1")
    schedules = ("cosine", "linear", "step", "multistep", "constant")
    require("TRAIN.LR_SCHEDULER.NAME", train.LR_SCHEDULER.NAME in schedules, f"one of {', '.join(schedules)}")
    require("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", train.LR_SCHEDULER.DECAY_EPOCHS >= 1, "at least 1")
    require("TRAIN.LR_SCHEDULER.MULTISTEPS", are_numbers(train.LR_SCHEDULER.MULTISTEPS, int), "a list of epochs")
    betas = train.OPTIMIZER.BETAS
    require("TRAIN.OPTIMIZER.BETAS", are_numbers(betas) and all(0 <= b < 1 for b in betas), "numbers in [0, 1)")
    require("AUG.MESA", aug.MESA >= 0, "at least 0")
    require("AUG.MESA", aug.MESA == 0 or train.MODEL_EMA, "0 without TRAIN.MODEL_EMA, because the EMA is the teacher")
    require("AUG.MESA_START", 0 <= aug.MESA_START <= 1, "in [0, 1]")
    for key in ("REPROB", "HFLIP", "MIXUP_PROB", "MIXUP_SWITCH_PROB"):
        require(f"AUG.{key}", 0 <= aug[key] <= 1, "a probability in [0, 1]")
    require("AUG.RECOUNT", aug.RECOUNT >= 1, "at least 1")
    for key in ("COLOR_JITTER", "MIXUP", "CUTMIX"):
        require(f"AUG.{key}", aug[key] >= 0, "at least 0")
    require("AUG.MIXUP_MODE", aug.MIXUP_MODE in ("batch", "pair", "elem"), "batch, pair or elem")
    require("AUG.REMODE", aug.REMODE in ("pixel", "rand", "const"), "pixel, rand or const")
    for key in ("SCALE", "RATIO"):
        pair = aug[key]
        rising = are_numbers(pair) and len(pair) == 2 and 0 < pair[0] <= pair[1]
        require(f"AUG.{key}", rising, "two rising positive numbers")
    require("AUG.SCALE", aug.SCALE[1] <= 1, "at most the whole image, 1.0")
    span = aug.CUTMIX_MINMAX
    spans = span is None or (are_numbers(span) and len(span) == 2 and 0 <= span[0] < span[1] <= 1)
    require("AUG.CUTMIX_MINMAX", spans, "None, or two rising numbers in [0, 1]")
    if trains and uses_mixup(config):
        require("DATA.BATCH_SIZE", data.BATCH_SIZE % 2 == 0, "even, because Mixup pairs the images of a batch")
    require("AMP_DTYPE", config.AMP_DTYPE in ("auto", "bfloat16", "float16"), "auto, bfloat16 or float16")
    require("DEVICE", config.DEVICE in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    require("SAVE_FREQ", config.SAVE_FREQ >= 1, "at least 1")
    require("PRINT_FREQ", config.PRINT_FREQ >= 1, "at least 1")
    require("SEED", config.SEED >= 0, "at least 0")
    batches = config.THROUGHPUT_BATCHES
    require("THROUGHPUT_BATCHES", are_numbers(batches, int) and all(b >= 1 for b in batches), "positive batch sizes")


def uses_mixup(config: CfgNode) -> bool:
    """Whether the recipe mixes images, by Mixup or CutMix."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested sections to ``(dotted key, value)``."""
    flat = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += leaves(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return flat


def to_plain(config: CfgNode) -> dict[str, Any]:
    """The config as plain containers, which any reader of a checkpoint or JSON file can load."""
    return {key: to_plain(value) if isinstance(value, CfgNode) else value for key, value in config.items()}


def _merge_file(config: CfgNode, path: Path, notes: list[str], seen: tuple[Path, ...]) -> None:
    if path.resolve() in seen:
        raise InputError(f"{path}: names itself through BASE")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read this config file ({getattr(error, 'strerror', error)})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config file must hold keys and values, found {type(tree).__name__}")
    bases = tree.pop("BASE", None) or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise InputError(f"{path}: BASE takes names of YAML files, got {base!r}")
        if base:
            _merge_file(config, path.parent / with_home(base), notes, (*seen, path.resolve()))
    given: dict[str, tuple[str, Any]] = {}
    for name, value in leaves(tree):
        key, value = _meaning_of(name, value)
        other, earlier = given.setdefault(key, (name, value))
        if other != name and earlier != value:
            raise InputError(f"{path}: {other} and {name} set the same to {earlier!r} and {value!r}; remove one")
        _merge_value(config, key, value, str(path), notes)
    if is_published_run(tree):
        config.TRAIN.SCALE_LR = False
        notes.append(f"{path}: the config of a published run, whose learning rates are taken as they are, not scaled")


def is_published_run(settings: Mapping[str, Any]) -> bool:
    """Whether settings are those that the published trainer saves: learning rates already scaled to the batch."""
    return "LOCAL_RANK" in settings and "SCALE_LR" not in settings.get("TRAIN", {})


def by_meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings saved by this trainer or the published one, as ``{key of this trainer: value}``."""
    return dict(_meaning_of(name, value) for name, value in leaves(settings))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    message = f"{key.value} is given twice, in lines {lines[key.value]} and {line}"
                    raise yaml.constructor.ConstructorError(problem=message)
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _merge_value(config: CfgNode, key: str, value: Any, source: str, notes: list[str]) -> None:
    if any(key == unused or key.startswith(f"{unused}.") for unused in _UNUSED_KEYS):
        notes.append(f"{source}: {key} has no effect here")
        return
    if key in _FIXED_KEYS:
        value = CfgNode._decode_cfg_value(value)
        if value not in _FIXED_KEYS[key]:
            raise InputError(f"{source}: {key} is {value!r}, but what is built here is {_FIXED_KEYS[key][-1]!r}")
        return

    *sections, leaf = key.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node:
        raise InputError(f"{source}: unknown config key {key}{_suggestion(key)}")
    if isinstance(node[leaf], CfgNode):
        raise InputError(f"{source}: {key} is a section; set one of its keys, such as {key}.{next(iter(node[leaf]))}")
    current = node[leaf]
    if isinstance(current, str) and isinstance(value, str | int | float) and not isinstance(value, bool):
        node[leaf] = str(value)  # a tag or folder may look like a number
        return
    if isinstance(value, str):
        value = CfgNode._decode_cfg_value(value)
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    kind = type(current).__name__
    if current is not None and (value is None or isinstance(current, bool) != isinstance(value, bool)):
        raise InputError(f"{source}: {key} takes a {kind}, got {value!r}")
    try:
        config.merge_from_list([key, value])
    except ValueError as error:
        raise InputError(f"{source}: {key} takes a {kind}, got {value!r}") from error


def _meaning_of(name: str, value: Any) -> tuple[str, Any]:
    """The key that a setting has here, and its value with the meaning that it has here."""
    parts = str(name).split(".")
    if parts[0] == "MODEL" and len(parts) > 1 and parts[1].upper() in _MODEL_SECTIONS:
        parts[1] = "SPATIAL_MAMBA"
    key = ".".join(parts)
    key = _RENAMED_KEYS.get(key, key)
    if key == "AUG.MESA":  # published files switch it off by -1
        gain = CfgNode._decode_cfg_value(value)
        value = 0.0 if isinstance(gain, int | float) and gain < 0 else value
    return key, value


def _suggestion(key: str) -> str:
    return _closest(key.upper(), [name for name, _ in leaves(_C)])


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""
