"""Reads checkpoint files safely and loads them strictly, with one clear error for whatever is wrong."""

import logging
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...kernels.home import with_home
from .architecture import FIRST_CONV, FUSED, architecture_of, describe_other_architecture, is_fused
from .checkpoint_reader import read_torch_file
from .safetensors_files import read_safetensors
from .stand_ins import DamagedFileError, ForeignTypeError

if TYPE_CHECKING:
    from .spatial_mamba import SpatialMambaBackbone, SpatialMambaEncoder

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net")  # where checkpoints keep their weights
EMA_KEYS = ("model_ema", "state_dict_ema")  # the second is timm's
CLASSIFIER_ONLY = ("norm.weight", "norm.bias", "head.weight", "head.bias")  # not in backbones
# Parts that wrapper modules add to the names of weights: DDP, torch.compile, activation checkpointing and FSDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module)\."
)
_OTHER_CLASSES = (
    "; the backbone fits, so the numbers of classes probably differ: set num_classes of the heads in the config to "
    "those of the checkpoint, or start from its backbone alone with model.backbone.pretrained=FILE instead of load_from"
)

logger = logging.getLogger(__name__)


class WeightsError(UserError):
    """A checkpoint file is missing, unsafe, damaged, or does not fit the model."""


def read_checkpoint(
    path: str | PathLike[str], history: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """Load a checkpoint onto the CPU without executing anything in it.

    A file that ends in ``.safetensors`` has tensors only. PyTorch's own formats may also have plain containers, paths,
    dates, simple namespaces, yacs configs, dtypes, NumPy's numbers and arrays, the options of timm's scripts and
    mmengine's histories. The options are discarded. A file with any other type, with tensors that are not dense, or
    with a wrong checksum is refused.

    Args:
        history: makes a history of mmengine from its attributes; by default histories are discarded.

    Raises:
        WeightsError: naming the file and the fix.
    """
    if not str(path):
        raise WeightsError("the path of the checkpoint is empty")
    if "://" in str(path):
        raise WeightsError(f"{path}: is a URL; download the file and give its path")
    path = Path(with_home(str(path)))
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty; download or save it again")
    try:
        checkpoint = read_safetensors(path) if is_safetensors(path) else read_torch_file(path, history)
    except ForeignTypeError as error:
        raise WeightsError(
            f"{path}: refused, because it asks to load {str(error)[:200]}, which could run code; "
            "save it again with tensors and plain Python values only"
        ) from error
    except Exception as error:  # a damaged file can raise any type
        kind = "safetensors file" if is_safetensors(path) else "PyTorch checkpoint"
        reason = f" ({str(error)[:200]})" if isinstance(error, DamagedFileError | zipfile.BadZipFile) else ""
        raise WeightsError(f"{path}: not a {kind}, or a damaged one{reason}; download or save it again") from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint dictionary")
    return checkpoint


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file by its name."""
    return path.suffix.lower() == ".safetensors"


def state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str], key: str = "model") -> dict[str, Tensor]:
    """The state dict that a checkpoint stores under ``key``, or the checkpoint itself if it is a state dict.

    ``"model"`` means all of ``WEIGHT_KEYS``. The names are those of ``plain_names``.

    Raises:
        WeightsError: if there are no weights, or more than one set of them.
    """
    keys = WEIGHT_KEYS if key == "model" else (key,)
    found = [name for name in keys if is_state_dict(checkpoint.get(name))]
    if len(found) > 1:
        raise WeightsError(f"{path}: holds weights under {' and '.join(found)}; save only those you want to load")
    state = checkpoint[found[0]] if found else checkpoint
    if not is_state_dict(state):
        raise WeightsError(
            f"{path}: found no model weights; expected them under {' or '.join(keys)}, or at the top level"
        )
    return plain_names(state, path)


def is_state_dict(state: Any) -> bool:
    """Whether an entry of a checkpoint maps names to tensors and is not empty."""
    return (
        isinstance(state, Mapping)
        and len(state) > 0
        and all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in state.items())
    )


def plain_names(state: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Any]:
    """Remove what wrappers add to names of weights: DDP, FSDP, ``torch.compile``, checkpointing, averaging.

    The counter of ``torch.optim.swa_utils.AveragedModel`` is dropped.

    Raises:
        WeightsError: if two names become equal.
    """
    plain: Any = OrderedDict()
    for name, entry in state.items():
        short = _WRAPPERS.sub("", name)
        if short.split(".")[-1] == "n_averaged":
            continue
        if short in plain:
            raise WeightsError(f"{path}: holds {short} twice, once with the name of a wrapper; save one of them")
        plain[short] = entry
    if hasattr(state, "_metadata"):  # versions of modules by name, which PyTorch reads
        versions = {_WRAPPERS.sub("", f"{name}.").removesuffix("."): entry for name, entry in state._metadata.items()}
        plain._metadata = OrderedDict(versions)
    return plain


def under_own_names(own: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename weights with plain names to the names in a model, parts of which may be wrapped."""
    if own.keys() == state.keys():
        return state
    names = {_WRAPPERS.sub("", name): name for name in own}
    return {names.get(name, name): entry for name, entry in state.items()}


def has_entry(checkpoint: Mapping[str, Any], key: str) -> bool:
    """Whether a checkpoint has an entry that is neither None nor an empty dictionary; it may be of any other type."""
    entry = checkpoint.get(key)
    return entry is not None and not (isinstance(entry, Mapping) and len(entry) == 0)


def saved_class_names(checkpoint: Mapping[str, Any], count: int | None) -> list[str] | None:
    """Names of the ``count`` classes of a checkpoint's classifier, in the order of the logits; None if it has none."""
    names = checkpoint.get("classes")
    return list(map(str, names)) if isinstance(names, list) and len(names) == count else None


def has_ema(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has EMA weights, under the key of the published trainer or of timm."""
    return any(has_entry(checkpoint, key) for key in EMA_KEYS)


def ema_state_dict_of(checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Tensor]:
    """The EMA weights in a checkpoint of this trainer, the published one or timm's.

    Raises:
        WeightsError: if there are none.
    """
    for key in EMA_KEYS:
        if has_entry(checkpoint, key):
            return state_dict_of(checkpoint, path, key)
    raise WeightsError(f"{path}: holds no EMA weights; use those of the model, without --ema")


def model_weights(
    checkpoint: Mapping[str, Any], path: str | PathLike[str], ema: bool = False, prefix: str = ""
) -> dict[str, Tensor]:
    """The weights of the classifier or backbone in a checkpoint, or its EMA weights, under their own names.

    Raises:
        WeightsError: as ``state_dict_of`` or ``ema_state_dict_of``, and ``encoder_weights``, and for a fused model.
    """
    state = ema_state_dict_of(checkpoint, path) if ema else state_dict_of(checkpoint, path)
    state = encoder_weights(state, path, prefix)
    if is_fused(state):
        raise WeightsError(f"{path}: {FUSED}")
    return state


def encoder_weights(
    state: Mapping[str, Tensor], path: str | PathLike[str], prefix: str = "", whole: bool = False
) -> dict[str, Tensor]:
    """The weights of a classifier or backbone, with any prefix of their names removed.

    Detectors and segmentors name them ``backbone.*``, training frameworks ``model.*``, ``net.*`` or similar. A warning
    in the log names the prefix.

    Args:
        state: the state dict of a file, see ``state_dict_of``.
        path: the file, for messages.
        prefix: selects one of several models; without it there must be exactly one.
        whole: remove only a prefix that all names have.

    Raises:
        WeightsError: if no name starts with ``prefix``, or if several prefixes lead to a complete model.
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
    others = f"; other entries are ignored: {len(state) - len(inner)}" if len(inner) < len(state) else ""
    logger.warning("%s: loading the weights named %s* without this prefix%s", path, common, others)
    return inner


def _prefix_of(state: Mapping[str, Tensor], path: str | PathLike[str]) -> str:
    """The prefix of the names of the only Spatial-Mamba in a state dict; "" if there is none."""
    found = [name.removesuffix(FIRST_CONV) for name in state if f".{name}".endswith(f".{FIRST_CONV}")]
    if len(found) > 1:
        found = [prefix for prefix in found if architecture_of(_under(state, prefix)) is not None]
    if len(found) > 1:
        names = " and ".join(f"{prefix}*" for prefix in sorted(found))
        raise WeightsError(
            f"{path}: holds several models, named {names}; choose one, such as {max(found)}, with the option --prefix "
            "of spatial-mamba checkpoint convert, or as prefix in init_cfg"
        )
    return found[0] if found else ""


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): entry for name, entry in state.items() if name.startswith(prefix)}


def fit_first_convolution(
    model: "SpatialMambaEncoder", state: Mapping[str, Tensor], path: str | PathLike[str]
) -> Mapping[str, Tensor]:
    """Adapt weights trained on RGB images to a model with a different number of input channels, by timm's rule.

    The kernels of the first convolution are summed for one channel, and repeated and scaled for other numbers. A
    warning in the log says so. All other weights are unchanged.
    """
    weight = state.get(FIRST_CONV)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or model.in_chans == 3:
        return state
    logger.warning("%s: adapting its first convolution from 3 input channels to %d", path, model.in_chans)
    return {**state, FIRST_CONV: adapt_input_conv(model.in_chans, weight)}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """``load_state_dict``, but check every name and shape before changing anything.

    Raises:
        WeightsError: naming the variants or the numbers of classes if these differ, or else the first differences.
    """
    own = model.state_dict()
    state = under_own_names(own, state)
    if problem := describe_misfit(own, state):
        raise WeightsError(f"{path}: {problem}")
    model.load_state_dict(state, strict=True)


def describe_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Why weights do not fit a model, detector or segmentor, and the fix; None if they fit."""
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
    """The first differences in names and shapes between the state dicts of a model and a file; None if they match."""
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is not part of the model" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, but the model has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if not problems:
        return None
    shown = "; ".join(sorted(problems)[:3]) + ("; ..." if len(problems) > 3 else "")
    return f"does not fit this model in {len(problems)} entries: {shown}"


def load_backbone_weights(model: "SpatialMambaBackbone", path: str | PathLike[str], prefix: str = "") -> None:
    """Initialise a backbone from the checkpoint of a classifier, detector, segmentor or backbone.

    The final norm and the classifier are ignored, and stages after the last of ``out_indices``. ``outnorm`` layers that
    the checkpoint does not have keep their values, with a warning if it has others. Weights for RGB images are adapted
    to the model's channels.

    Args:
        prefix: of the names of the backbone's weights, if the file has several models.

    Raises:
        WeightsError: as ``read_checkpoint`` and ``load_strictly``, or if no name has the prefix.
    """
    state = model_weights(read_checkpoint(path), path, prefix=prefix)
    own_norms = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("outnorm")}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in CLASSIFIER_ONLY
        and (name in own_norms or not name.startswith("outnorm"))
        and not (model.ends_early and _follows_stage(name, len(model.layers) - 1))
    }
    missing = sorted(own_norms.keys() - state.keys())
    if missing and len(missing) < len(own_norms):
        logger.warning("%s: has no %s, which start from their initial values", path, ", ".join(missing))
    load_strictly(model, {**own_norms, **fit_first_convolution(model, state, path)}, path)


def _follows_stage(name: str, last: int) -> bool:
    """Whether a weight belongs to the downsampling of stage ``last`` or to a later stage."""
    stage = re.match(r"layers\.(\d+)\.(downsample)?", name)
    return stage is not None and (int(stage[1]) > last or (int(stage[1]) == last and stage[2] is not None))
