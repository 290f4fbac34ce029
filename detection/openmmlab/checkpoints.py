"""Reads OpenMMLab's checkpoints with PyTorch's ``weights_only`` on, and loads them strictly."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...classification.models.safe_types import allow_permanently, history_types, safe_types
from ...classification.models.weights import WeightsError, describe_misfit, plain_names


def allow_safe_types() -> None:
    """Let PyTorch's safe reader read the types in mmengine's checkpoints for the rest of the process.

    These are histories of logged values, and NumPy's arrays and scalars under the names of NumPy 1 and 2. A stand-in
    that accepts only numbers reads each. The reader still refuses every other type by name.
    """
    allow_permanently([*safe_types(), *history_types(_History)])


class _History(HistoryBuffer):
    """Reads a ``HistoryBuffer`` and becomes one; the original would let a file replace the methods of all of them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(self, state["_log_history"], state["_count_history"], int(state["max_length"]))


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuses a checkpoint unless every name and shape fits the model; mmengine would only print the differences.

    It also stops mmengine from executing a config in the checkpoint (``meta.config``) when a run is resumed.

    Args:
        may_differ: prefixes of names that may be missing, unused or of another shape, such as those of the heads when
            a detector is fine-tuned for other classes.
    """

    def __init__(self, may_differ: tuple[str, ...] = ()) -> None:
        self.may_differ = tuple(may_differ)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before the weights are loaded, and remove the config.

        Raises:
            WeightsError: naming the first differences.
        """
        checkpoint.get("meta", {}).pop("config", None)
        path = runner._load_from or runner.work_dir
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = _own_names(_unwrapped(runner.model), checkpoint["state_dict"], path)
        check_fit(runner.model, checkpoint, path, self.may_differ)


def check_fit(model: nn.Module, checkpoint: dict[str, Any], path: str, may_differ: tuple[str, ...] = ()) -> None:
    """Check that a checkpoint fits a model, wrapped or not, in every name and shape.

    Raises:
        WeightsError: naming the first differences.
    """
    model = _unwrapped(model)
    state = _own_names(model, checkpoint.get("state_dict", checkpoint), path)
    own = model.state_dict()
    kept = [{name: t for name, t in s.items() if not name.startswith(may_differ or "\0")} for s in (own, state)]
    if problem := describe_misfit(*kept):
        raise WeightsError(f"{path}: {problem}")


def _unwrapped(model: Any) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _own_names(model: nn.Module, state: dict[str, Any], path: str) -> dict[str, Any]:
    """Remove the names of wrappers from those of the weights, unless the model has the same names."""
    return state if state.keys() == model.state_dict().keys() else plain_names(state, path)
