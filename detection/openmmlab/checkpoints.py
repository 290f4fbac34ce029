"""OpenMMLab's checkpoints: read with PyTorch's weights_only left on, and loaded strictly."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...classification.models.safe_types import admit_for_good, history_types, safe_types
from ...classification.models.weights import WeightsError, describe_misfit, plain_names


def admit_safe_types() -> None:
    """Let PyTorch's safe reader, in this process, take what mmengine's checkpoints hold beside tensors.

    That is the history of logged values and NumPy arrays and scalars, under the names of NumPy 1 and 2; each is read
    by a stand-in that takes numbers only. Everything else is refused by the reader, with its name.
    """
    admit_for_good([*safe_types(), *history_types(_History)])


class _History(HistoryBuffer):
    """In place of ``HistoryBuffer``, which lets a file exchange the methods of all of them; turns into one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = HistoryBuffer
        self.__init__(state["_log_history"], state["_count_history"], int(state["max_length"]))


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuses a checkpoint that does not fit the model in every name and shape; mmengine would only print that.

    It also keeps mmengine from executing a config inside of a checkpoint (``meta.config``) when a run is resumed.

    Args:
        may_differ: prefixes of names that may be missing, left over or of another shape: those of the heads, where
            a detector is fine-tuned for other classes.
    """

    def __init__(self, may_differ: tuple[str, ...] = ()) -> None:
        self.may_differ = tuple(may_differ)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare before the weights are put in place; forget a config, which mmengine would execute on resuming.

        Raises:
            WeightsError: naming the first differences.
        """
        checkpoint.get("meta", {}).pop("config", None)
        path = runner._load_from or runner.work_dir
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = _own_names(_unwrapped(runner.model), checkpoint["state_dict"], path)
        check_fit(runner.model, checkpoint, path, self.may_differ)


def check_fit(model: nn.Module, checkpoint: dict[str, Any], path: str, may_differ: tuple[str, ...] = ()) -> None:
    """Compare a checkpoint with a model, wrapped or not, in names and shapes.

    Raises:
        WeightsError: naming the first differences.
    """
    model = _unwrapped(model)
    state = _own_names(model, checkpoint.get("state_dict", checkpoint), path)
    own = model.state_dict()
    kept = [{name: t for name, t in s.items() if not name.startswith(may_differ or "\0")} for s in (own, state)]
    if problem := describe_misfit(*kept):
        raise WeightsError(f"{path}: {problem}")


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _own_names(model: nn.Module, state: dict[str, Any], path: str) -> dict[str, Any]:
    """Weights without what wrappers put into their names, unless the model has the same names."""
    return state if state.keys() == model.state_dict().keys() else plain_names(state, path)
