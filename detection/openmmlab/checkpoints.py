"""Reads OpenMMLab's checkpoints safely and loads them strictly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner

from ...classification.models.stand_ins import DamagedFileError
from ...classification.models.weights import WeightsError, describe_misfit, is_state_dict, plain_names, read_checkpoint


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local checkpoint onto the CPU, with mmengine's histories of logged values.

    Raises:
        WeightsError: see ``read_checkpoint``.
    """
    return read_checkpoint(filename, history=_history)


def _history(attributes: dict[str, Any]) -> HistoryBuffer:
    values, counts, length = attributes.values()
    are_arrays = isinstance(values, np.ndarray) and isinstance(counts, np.ndarray) and values.ndim == 1
    if not are_arrays or values.shape != counts.shape or type(length) is not int or length < 1:
        raise DamagedFileError("a history of mmengine is wrong")
    history = HistoryBuffer(max_length=length)
    history._log_history, history._count_history = values, counts  # a file may refer to the same array many times
    return history


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuses a checkpoint unless every name and shape fits the model; mmengine would only print the differences.

    It also stops mmengine from executing a config in the checkpoint (``meta.config``) when a run is resumed.

    Args:
        may_differ: prefixes of names that may be missing, unused or of another shape, such as those of the heads when
            a detector is fine-tuned for other classes.
    """

    def __init__(self, may_differ: str | Sequence[str] = ()) -> None:
        self.may_differ = (may_differ,) if isinstance(may_differ, str) else tuple(may_differ)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before the weights are loaded, and remove the config.

        Raises:
            WeightsError: naming the first differences.
        """
        path = runner._load_from or runner.work_dir
        meta = checkpoint.get("meta", {})
        if not isinstance(meta, dict):
            raise WeightsError(f"{path}: its meta is not a dictionary; save it again with mmengine")
        meta.pop("config", None)
        # Also for weights at the top level: mmengine would silently ignore those under other names.
        checkpoint["state_dict"] = fitting_weights(runner.model, checkpoint, path, self.may_differ)


def unwrapped(model: Any) -> Any:
    """The model in wrappers for several processes or for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def fitting_weights(
    model: Any, checkpoint: dict[str, Any], path: str, may_differ: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the weights of a checkpoint, after checking that every name and shape fits the model, wrapped or not.

    Prefixes added by wrappers (``module.``) are removed, unless the model has the same names.

    Raises:
        WeightsError: if there are no weights, or naming the first differences.
    """
    own, state = unwrapped(model).state_dict(), checkpoint.get("state_dict", checkpoint)
    if not is_state_dict(state):
        raise WeightsError(
            f"{path}: found no model weights under state_dict or at the top level; "
            "a classifier's checkpoint is given as model.backbone.pretrained"
        )
    if state.keys() != own.keys():
        state = plain_names(state, path)
    kept = [{name: t for name, t in s.items() if not name.startswith(may_differ or "\0")} for s in (own, state)]
    if problem := describe_misfit(*kept):
        raise WeightsError(f"{path}: {problem}")
    return state
