"""Reads checkpoint files safely and loads them strictly, with one clear error for everything that can be wrong."""

import json
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .architecture import FIRST_CONV, architecture_of, describe_other_architecture
from .home import with_home
from .safe_types import safe_types_admitted

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net")  # where checkpoints keep their weights
METADATA_KEY = "spatial_mamba"  # of what a safetensors file of this project tells in JSON beside its weights
EMA_KEYS = ("model_ema", "state_dict_ema")  # the second is timm's
CLASSIFIER_ONLY = ("norm.weight", "norm.bias", "head.weight", "head.bias")  # what backbones leave out
# Modules that hold the model, or a part of it, and put their name into those of the weights: DDP's, torch.compile's,
# activation checkpointing's and FSDP's.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module)\."
)
# What the readers of PyTorch's two file formats raise on other files and on damaged ones.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)
_OTHER_CLASSES = (
    "; the backbone fits, so mostly the numbers of classes differ: set num_classes of the heads in the config to those "
    "of the checkpoint, or start from its backbone alone with model.backbone.pretrained=FILE in place of load_from"
)

logger = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A checkpoint file is missing, unsafe, damaged, or does not fit the model."""


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint onto the CPU without executing anything it contains.

    A file that ends in ``.safetensors`` holds tensors alone. PyTorch's own formats may also hold plain containers,
    paths, dates, simple namespaces, yacs configs, NumPy's numbers and arrays, the options of timm's scripts and
    mmengine's histories; of the last two nothing is kept, except histories where mmengine is at work. A pickle that
    names any other type is refused.

    Raises:
        WeightsError: naming the file and what to do about it.
    """
    if not str(path):
        raise WeightsError("the path of the checkpoint is empty")
    if "://" in str(path):
        raise WeightsError(f"{path}: is an address; download the file and give its path")
    path = Path(with_home(str(path)))
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty; download or save it again")
    try:
        if is_safetensors(path):
            return _read_safetensors(path)
        with safe_types_admitted():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or a truncated one; download or save it again") from error
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        foreign = re.search(r"(?:Unsupported global:|unsupported) GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise WeightsError(
                f"{path}: refused, because it asks to load {foreign[1]}, which could run code; "
                "save it again with tensors and plain Python values only"
            ) from error
        raise WeightsError(
            f"{path}: not a PyTorch checkpoint, or a truncated one; download or save it again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint dictionary")
    return checkpoint


def is_safetensors(path: Path) -> bool:
    """Whether the name of a file says that it is a safetensors file."""
    return path.suffix.lower() == ".safetensors"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors, bare; or, in files of this project, as the entry "model" beside what is known of them."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return {**about, "model": tensors} if about else tensors


def state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str], key: str = "model") -> dict[str, Tensor]:
    """The state dict a checkpoint stores under ``key``, or the checkpoint itself if it is a bare state dict.

    ``"model"`` stands for all of ``WEIGHT_KEYS``. Names lose what wrappers put into them (see ``plain_names``).

    Raises:
        WeightsError: if there are no weights to be found, or more than one set of them.
    """
    keys = WEIGHT_KEYS if key == "model" else (key,)
    found = [name for name in keys if _is_state_dict(checkpoint.get(name))]
    if len(found) > 1:
        raise WeightsError(f"{path}: holds weights under {' and '.join(found)}; save those you mean alone")
    state = checkpoint[found[0]] if found else checkpoint
    if not _is_state_dict(state):
        raise WeightsError(
            f"{path}: found no model weights; expected them under {' or '.join(keys)}, or at the top level"
        )
    return plain_names(state, path)


def _is_state_dict(state: Any) -> bool:
    """Whether an entry of a checkpoint maps names to tensors, and to at least one."""
    return (
        isinstance(state, Mapping)
        and len(state) > 0
        and all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in state.items())
    )


def plain_names(state: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Any]:
    """Weights under their names without those of wrappers: DDP, FSDP, ``torch.compile``, checkpointing, averaging.

    The counter of ``torch.optim.swa_utils.AveragedModel`` is left out.

    Raises:
        WeightsError: if two names become the same.
    """
    plain: OrderedDict[str, Any] = OrderedDict()
    for name, entry in state.items():
        short = _WRAPPERS.sub("", name)
        if short.split(".")[-1] == "n_averaged":
            continue
        if short in plain:
            raise WeightsError(f"{path}: holds {short} twice, once with the name of a wrapper; save one of them")
        plain[short] = entry
    if hasattr(state, "_metadata"):  # PyTorch's, by the names of modules
        versions = {_WRAPPERS.sub("", f"{name}.").removesuffix("."): entry for name, entry in state._metadata.items()}
        plain._metadata = OrderedDict(versions)
    return plain


def under_own_names(own: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights of plain names under those that a model has for them, parts of which may be in wrappers, too."""
    if own.keys() == state.keys():
        return state
    names = {_WRAPPERS.sub("", name): name for name in own}
    return {names.get(name, name): entry for name, entry in state.items()}


def ema_state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Tensor]:
    """The EMA weights of a checkpoint of this trainer, the published one or timm's.

    Raises:
        WeightsError: if it holds none.
    """
    for key in EMA_KEYS:
        if checkpoint.get(key):
            return state_dict_of(checkpoint, path, key)
    raise WeightsError(f"{path}: holds no EMA weights; take those of the model, without --ema")


def encoder_weights(
    state: Mapping[str, Tensor], path: str | PathLike[str], prefix: str = "", whole: bool = False
) -> dict[str, Tensor]:
    """The weights of a classifier or backbone by its own names, whatever prefix they have in front of them.

    Detectors and segmentors name them ``backbone.*``, training frameworks ``model.*``, ``net.*`` or the like. A line in
    the log names the prefix.

    Args:
        state: the state dict of a file, see ``state_dict_of``.
        path: of the file, for messages.
        prefix: the names to take, where there are several sets; without it there must be one set alone.
        whole: take off only a prefix that all names have.

    Raises:
        WeightsError: if no name starts with ``prefix``, or if several prefixes lead to weights of a whole model.
    """
    if prefix:
        prefix = f"{prefix.rstrip('.')}."
        state = _under(state, prefix)
        if not state:
            raise WeightsError(f"{path}: holds no weights whose names start with {prefix}")
    common = _prefix_of(state, path)
    inner = _under(state, common)
    if not common or (whole and len(inner) < len(state)):
        return dict(state)
    others = f", {len(state) - len(inner)} other entries are left out" if len(inner) < len(state) else ""
    logger.warning("%s: takes its weights named %s* without this prefix%s", path, common, others)
    return inner


def _prefix_of(state: Mapping[str, Tensor], path: str | PathLike[str]) -> str:
    """What stands in front of the names of the one Spatial-Mamba among weights; "" for nothing, or where is none."""
    found = [name.removesuffix(FIRST_CONV) for name in state if f".{name}".endswith(f".{FIRST_CONV}")]
    if len(found) > 1:
        found = [prefix for prefix in found if architecture_of(_under(state, prefix)) is not None]
    if len(found) > 1:
        names = " and ".join(f"{prefix}*" for prefix in sorted(found))
        raise WeightsError(
            f"{path}: holds several models, named {names}; choose one, such as {max(found)}, with the option --prefix "
            "of python -m spatial_mamba.checkpoint convert, or as prefix in init_cfg"
        )
    return found[0] if found else ""


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): entry for name, entry in state.items() if name.startswith(prefix)}


def fit_first_convolution(
    model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str]
) -> Mapping[str, Tensor]:
    """Weights of RGB images for a model that starts from them on images of other channels, by timm's rule.

    The kernels of the first convolution are summed up for one channel, and repeated and scaled for others. A line in
    the log says so. Everything else is returned as it is.
    """
    weight = state.get(FIRST_CONV)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or model.in_chans == 3:
        return state
    logger.warning("%s: its first convolution, of 3 channels, is adapted to %d", path, model.in_chans)
    return {**state, FIRST_CONV: adapt_input_conv(model.in_chans, weight)}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """``load_state_dict`` that checks every name and shape before it changes anything.

    Raises:
        WeightsError: naming the variants or the numbers of classes, where these differ, or else the first differences.
    """
    own = model.state_dict()
    state = under_own_names(own, state)
    if problem := describe_misfit(own, state):
        raise WeightsError(f"{path}: {problem}")
    model.load_state_dict(state, strict=True)


def describe_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Why weights do not fit a model, or a detector or segmentor, with the remedy; None if they do."""
    problems = describe_differences(own, state)
    if problems is None:
        return None
    backbones = _under(own, "backbone."), _under(state, "backbone.")
    other = describe_other_architecture(own, state) or describe_other_architecture(*backbones)
    if other:
        return other
    heads_differ = own.keys() == state.keys() and describe_differences(*backbones) is None and backbones[0]
    return problems + (_OTHER_CLASSES if heads_differ else "")


def describe_differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first differences in names and shapes between a model's state dict and that of a file; None without any."""
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is not part of the model" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if not problems:
        return None
    shown = "; ".join(sorted(problems)[:3]) + ("; ..." if len(problems) > 3 else "")
    return f"does not fit this model in {len(problems)} entries: {shown}"


def load_backbone_weights(model: nn.Module, path: str | PathLike[str], prefix: str = "") -> None:
    """Start a backbone from the checkpoint of a classifier, or of a detector, segmentor or backbone.

    From the first it takes all but the final norm and the classifier, and its own ``outnorm`` layers keep their values.
    From the others it takes those of its output norms, too. What lies behind the last of its stages is left out if
    ``out_indices`` made it end early. Weights of RGB images are adapted to its channels.

    Args:
        prefix: of the names of the backbone's weights in the file, where there is more than one model in it.

    Raises:
        WeightsError: as ``read_checkpoint`` and ``load_strictly``, or if no name has the prefix.
    """
    state = encoder_weights(state_dict_of(read_checkpoint(path), path), path, prefix)
    own_norms = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("outnorm")}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in CLASSIFIER_ONLY
        and (name in own_norms or not name.startswith("outnorm"))
        and not (model.ends_early and _lies_behind(name, len(model.layers) - 1))
    }
    load_strictly(model, {**own_norms, **fit_first_convolution(model, state, path)}, path)


def _lies_behind(name: str, last: int) -> bool:
    """Whether weights belong to what follows the blocks of a stage."""
    stage = re.match(r"layers\.(\d+)\.(downsample)?", name)
    return stage is not None and (int(stage[1]) > last or (int(stage[1]) == last and stage[2] is not None))
