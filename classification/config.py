"""Configs of the trainer: YAML files and command-line overrides over the defaults, all checked."""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yacs.config import CfgNode

from ..kernels.command_line import closest
from ..kernels.errors import UserError
from ..kernels.home import with_home
from .settings import FINITE, SETTINGS, default_config

MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 100_000, 10_000, 20  # of a YAML file

CONFIG_FOLDER = Path(__file__).parents[1] / "configs" / "classification"

_MODEL_SECTIONS = ("SPATIALMAMBA", "VSSM")  # other names of MODEL.SPATIAL_MAMBA, in any case

# Keys of published files that do not change results. They are ignored, with a note in the log.
_UNUSED_KEYS = {
    "ENABLE_AMP", "FUSED_LAYERNORM", "FUSED_WINDOW_PROCESS", "LOCAL_RANK", "TRAINCOST_MODE",
    "DATA.DATASET", "DATA.MASK_PATCH_SIZE", "DATA.MASK_RATIO", "DATA.PERSISTENT_WORKERS", "MODEL.DDP", "MODEL.MMCKPT",
    "TEST.SEQUENTIAL", "TEST.SHUFFLE", "TRAIN.MOE", "TRAIN.START_EPOCH",
    *(f"MODEL.SPATIAL_MAMBA.{key}" for key in (
        "IMAGE_SIZE", "SSM_CONV_BIAS", "SSM_DT_RANK", "SSM_INIT", "SSM_FORWARDTYPE", "SSM_RANK_RATIO", "PATCH_NORM",
        "DOWNSAMPLE", "PATCHEMBED",
    )),
}  # fmt: skip
# Keys of published files with the only values supported here.
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
# What `ast.literal_eval` raises, as it says. yacs expects only the first two.
_UNDECODABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", list: "a list", tuple: "a list", str: "text"}
RATES = ("TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR")
_RENAMED_KEYS = {
    "MODEL.SPATIAL_MAMBA.SSM_D_STATE": "MODEL.SPATIAL_MAMBA.D_STATE",
    "TRAIN.MESA": "AUG.MESA",  # -1.0 switches it off
}


def load_config(name: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> tuple[CfgNode, list[str]]:
    """Apply a YAML file, after the files of its BASE, and ``(key, value)`` overrides to the defaults; check and freeze.

    Args:
        name: path of the file, or name of a shipped config.
        overrides: later ones win; strings are parsed (``1e-3`` is a number).

    Returns:
        The config, and one line for every key that is ignored or has a different meaning here.

    Raises:
        UserError: naming the file or option and the key.
    """
    config = default_config()
    notes: list[str] = []
    path, shipped = Path(with_home(str(name))), CONFIG_FOLDER / f"{name}.yaml"
    if not path.suffix and not path.exists() and not shipped.is_file():
        names = [file.stem for file in CONFIG_FOLDER.glob("*.yaml")]
        raise UserError(f"config {name}: no such file or shipped config{closest(str(name), names)}")
    _merge_file(config, shipped if not path.exists() and shipped.is_file() else path, notes, seen=())
    for key, value in overrides:
        _merge_value(config, *_meaning_of(key, value), "command line", notes)
    config.OUTPUT, config.DATA.DATA_PATH = with_home((config.OUTPUT, config.DATA.DATA_PATH))
    config.MODEL.PRETRAINED, config.MODEL.RESUME = with_home((config.MODEL.PRETRAINED, config.MODEL.RESUME))
    check_config(config)
    config.freeze()
    return config, notes


def check_config(config: CfgNode) -> None:
    """Refuse values that cannot work, before anything is built from them.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """

    def require(key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"{key} is {values[key]!r}; it must be {allowed}")

    values = dict(leaves(config))
    for setting in SETTINGS:
        for allowed in (FINITE, setting.allowed):
            require(setting.key, allowed.test(values[setting.key]), allowed.text)

    data, network, train, aug = config.DATA, config.MODEL.SPATIAL_MAMBA, config.TRAIN, config.AUG
    require("MODEL.SPATIAL_MAMBA.IN_CHANS", network.IN_CHANS == 3 or config.THROUGHPUT_MODE, "3, for RGB images")
    require("MODEL.SPATIAL_MAMBA.MLP_RATIO", network.MLP_RATIO * network.EMBED_DIM >= 1, "a positive number")
    require("TRAIN.WARMUP_EPOCHS", train.WARMUP_EPOCHS < train.EPOCHS, f"less than TRAIN.EPOCHS, {train.EPOCHS}")
    require("AUG.MESA", aug.MESA == 0 or train.MODEL_EMA, "0 without TRAIN.MODEL_EMA, because the EMA is the teacher")
    if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        stride = 4 * 2 ** (len(network.DEPTHS) - 1)
        several = data.BATCH_SIZE > 1 or stride < data.IMG_SIZE
        require("DATA.BATCH_SIZE", several, "above 1, because the last BatchNorm gets one pixel per image")
        even = data.BATCH_SIZE % 2 == 0 or not uses_mixup(config)
        require("DATA.BATCH_SIZE", even, "even, because Mixup pairs the images of a batch")


def uses_mixup(config: CfgNode) -> bool:
    """Whether the recipe uses Mixup or CutMix."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None


def images_per_update(config: CfgNode, world_size: int) -> int:
    """The total batch: images per step of all processes, times accumulation steps."""
    return config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested sections to ``(dotted key, value)``."""
    flat = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += leaves(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return flat


def to_plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as plain dictionaries, for checkpoints and JSON."""
    return {key: to_plain(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _merge_file(config: CfgNode, path: Path, notes: list[str], seen: tuple[Path, ...]) -> None:
    if path.resolve() in seen:
        raise UserError(f"{path}: includes itself through BASE")
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot read this config file ({getattr(error, 'strerror', None) or error})"
        ) from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path}: more than {MAX_CHARACTERS:,} characters are not a config")
    try:
        tree = yaml.load(text, _Loader)
        _count_values(tree)
    except Exception as error:  # PyYAML raises many types for values that it cannot construct
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config file must hold keys and values, found {type(tree).__name__}")
    bases = tree.pop("BASE", None) or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"{path}: BASE takes names of YAML files, got {base!r}")
        if base:
            _merge_file(config, path.parent / with_home(base), notes, (*seen, path.resolve()))
    given: dict[str, tuple[str, Any]] = {}
    for name, value in leaves(tree):
        key, value = _meaning_of(name, value)
        other, earlier = given.setdefault(key, (name, value))
        if other != name and earlier != value:
            raise UserError(f"{path}: {other} and {name} set the same key to {earlier!r} and {value!r}; remove one")
        _merge_value(config, key, value, str(path), notes)
    if is_published_run(tree):
        config.TRAIN.SCALE_LR = False
        notes.append(f"{path}: the config of a published run, whose learning rates are used as they are, not scaled")


def _count_values(tree: Any, depth: int = 0) -> int:
    """Number of values in a YAML tree; aliases can make it much larger than the file, or endless."""
    count = 1
    for entry in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if depth < MAX_DEPTH:
            count += _count_values(entry, depth + 1)
        if depth == MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels of them")
    return count


def is_published_run(settings: Mapping[str, Any]) -> bool:
    """Whether the published trainer saved these settings, with learning rates already scaled by the batch."""
    keys = dict(leaves(settings))
    return "LOCAL_RANK" in keys and "TRAIN.SCALE_LR" not in keys


def by_meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, of this trainer or the published one, as ``{key of this trainer: value}``.

    Values that no setting has, such as tensors in a damaged checkpoint, are left out.
    """
    plain = str | int | float | list | tuple | None
    return dict(_meaning_of(name, value) for name, value in leaves(settings) if isinstance(value, plain))


class _Loader(yaml.SafeLoader):
    """Reads dates as strings, and refuses a key that is given twice; YAML would keep the last."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of values")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

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
        value = _decoded(value)
        if value not in _FIXED_KEYS[key]:
            raise UserError(f"{source}: {key} is {value!r}; only {_FIXED_KEYS[key][-1]!r} is supported")
        return

    *sections, leaf = key.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node:
        known = [setting.key for setting in SETTINGS]
        raise UserError(f"{source}: unknown config key {key}{closest(key, known)}")
    if isinstance(node[leaf], CfgNode):
        raise UserError(f"{source}: {key} is a section; set one of its keys, such as {key}.{next(iter(node[leaf]))}")
    current = node[leaf]
    if isinstance(current, str) and isinstance(value, str | int | float) and not isinstance(value, bool):
        node[leaf] = str(value)  # a tag or folder may look like a number
        return
    value = _decoded(value)
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    kind = _KINDS.get(type(current))
    if current is not None and (value is None or isinstance(current, bool) != isinstance(value, bool)):
        raise UserError(f"{source}: {key} takes {kind}, got {value!r}")
    try:
        config.merge_from_list([key, value])
    except _UNDECODABLE as error:
        raise UserError(f"{source}: {key} takes {kind}, got {value!r}") from error


def _meaning_of(name: str, value: Any) -> tuple[str, Any]:
    """Key and value of a setting in this trainer."""
    parts = str(name).split(".")
    if parts[0] == "MODEL" and len(parts) > 1 and parts[1].upper() in _MODEL_SECTIONS:
        parts[1] = "SPATIAL_MAMBA"
    key = ".".join(parts)
    key = _RENAMED_KEYS.get(key, key)
    if key == "AUG.MESA":  # published files switch it off with -1
        gain = _decoded(value)
        value = 0.0 if isinstance(gain, int | float) and gain < 0 else value
    return key, value


def _decoded(value: Any) -> Any:
    """The value that a string stands for, such as ``1e-3``; any other value, and any other string, as it is."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except _UNDECODABLE:
        return value
