"""Training checkpoints: what a run is made of, saved atomically and restored strictly."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from .config import RATES, by_meaning, is_published_run, leaves, to_plain
from .errors import InputError
from .models.weights import WeightsError, load_strictly, read_checkpoint, state_dict_of
from .whole_files import whole_file

LATEST, BEST, BEST_EMA = "latest.pth", "best.pth", "best_ema.pth"
PUBLISHED_LATEST = "latest_ckpt.pth"  # of the published trainer

# Settings that may change between the parts of a run without changing its course.
_FREE_SETTINGS = {
    "DATA.CACHE_MODE", "DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.ZIP_MODE", "MODEL.NAME",
    "MODEL.NUM_CLASSES", "MODEL.RESUME", "MODEL.PRETRAINED", "OUTPUT", "PRINT_FREQ", "SAVE_FREQ", "TAG", "EVAL_MODE",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that training changes. Random numbers are no part of it: they follow from seed, epoch and rank."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    classes: list[str]  # names, in the order of the logits
    epoch: int = -1  # the last finished epoch
    updates: int = 0
    skipped_in_a_row: int = 0
    max_accuracy: float = 0.0
    max_accuracy_ema: float = 0.0


def save_checkpoint(state: TrainingState, config: CfgNode, path: Path) -> None:
    """Write a whole checkpoint or none: to a file beside ``path`` first, renamed once it is on the disk.

    Raises:
        InputError: if the disk does not take it; what was there before is kept.
    """
    content = {
        "model": state.model.state_dict(),
        "model_ema": state.ema.module.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": state.epoch,
        "steps": state.updates,
        "skipped_in_a_row": state.skipped_in_a_row,
        "max_accuracy": state.max_accuracy,
        "max_accuracy_ema": state.max_accuracy_ema,
        "classes": state.classes,
        "config": to_plain(config),
    }
    try:
        with whole_file(path) as unfinished:
            torch.save(content, unfinished)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        raise InputError(f"{path}: cannot be written ({error}); the checkpoint before it is kept") from error


def restore_checkpoint(
    state: TrainingState,
    config: CfgNode,
    checkpoint: dict[str, Any],
    path: Path,
    updates_per_epoch: int,
    rate_scale: float,
) -> None:
    """Continue from a checkpoint of this trainer or of the published one, after its last finished epoch.

    The settings in force are those of ``config``: learning rates and weight decay are not taken from the checkpoint.
    With the settings and the number of processes it was saved with, the run continues exactly.

    Args:
        rate_scale: factor on the learning rates of ``config``.

    Raises:
        WeightsError: if the weights do not fit.
        InputError: if the checkpoint lacks what training needs, or belongs to another optimiser.
    """
    missing = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
    if missing:
        raise InputError(f"{path}: cannot resume, it holds no {missing[0]}; start from it with --pretrained")
    load_strictly(state.model, state_dict_of(checkpoint, path), path)
    if state.ema:
        load_strictly(state.ema.module, _ema_state(checkpoint, path), path)
    try:
        saved, own = checkpoint["optimizer"], state.optimizer.state_dict()
        # timm puts the group without weight decay first, the published trainer last.
        saved_groups = sorted(saved["param_groups"], key=lambda group: group["weight_decay"] > 0)
        groups = zip(own["param_groups"], saved_groups, strict=True)
        groups = [{**own_group, "params": saved_group["params"]} for own_group, saved_group in groups]
        state.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: its optimiser does not fit this run ({error}); start from its weights with --pretrained"
        ) from error
    if checkpoint.get("scaler") and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.epoch = int(checkpoint["epoch"])
    state.updates = (state.epoch + 1) * updates_per_epoch
    if checkpoint.get("steps", 0) not in (0, state.updates):  # the published trainer stores 0
        logger.warning(
            "%s: its %d epochs had %d updates, with this data, batch size and number of processes they have %d: "
            "the run goes on from that epoch of the schedule, but not exactly",
            path, state.epoch + 1, checkpoint["steps"], state.updates,
        )  # fmt: skip
    state.scheduler.step_update(max(state.updates - 1, 0))
    state.skipped_in_a_row = int(checkpoint.get("skipped_in_a_row", 0))
    state.max_accuracy = float(checkpoint.get("max_accuracy", 0.0))
    # The published trainer spells the key of its EMA record in the second way.
    state.max_accuracy_ema = float(checkpoint.get("max_accuracy_ema", checkpoint.get("max_accuray_ema", 0.0)))
    _report_changes(config, checkpoint.get("config"), path, rate_scale)


def load_pretrained(
    model: nn.Module, ema: ModelEmaV3 | None, checkpoint: dict[str, Any], path: Path, finetune: bool
) -> None:
    """Put a checkpoint's weights in place, and its EMA weights (or else the same) into the EMA model.

    Args:
        finetune: keep the model's own classifier where the checkpoint's has another size.

    Raises:
        WeightsError: if the weights do not fit.
        InputError: if the classifier has another size and ``finetune`` is off.
    """
    load_strictly(model, _fit_head(model, state_dict_of(checkpoint, path), path, finetune), path)
    if ema:
        load_strictly(ema.module, _fit_head(model, _ema_state(checkpoint, path), path, finetune), path)


def find_resumable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run's folder that can be read whole; damaged ones are skipped with a warning.

    That is the latest, which is written after the others of its epoch: only with it are all of them there. Without
    it, the one with most updates. The folder may be one of the published trainer.
    """
    whole = []
    for path in (folder / name for name in (LATEST, BEST, BEST_EMA, PUBLISHED_LATEST)):
        if not path.is_file():
            continue
        try:
            whole.append((path, read_checkpoint(path)))
        except WeightsError as error:
            logger.warning("skipping a checkpoint that cannot be read: %s", error)
        else:
            if path.name == LATEST:
                break
    return max(whole, key=lambda found: found[1].get("steps", 0), default=None)


def _ema_state(checkpoint: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    return state_dict_of(checkpoint, path, key="model_ema" if checkpoint.get("model_ema") else "model")


def _fit_head(model: nn.Module, state: dict[str, torch.Tensor], path: Path, finetune: bool) -> dict[str, torch.Tensor]:
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    if "head.weight" not in state or len(state["head.weight"]) == len(own["head.weight"]):
        return state
    if not finetune:
        raise InputError(
            f"{path}: its classifier has {len(state['head.weight'])} classes, this run has {len(own['head.weight'])}; "
            "to train a new classifier on top of these weights, add --finetune"
        )
    return {**state, **own}


def _report_changes(config: CfgNode, saved: Any, path: Path, rate_scale: float) -> None:
    """Say which settings differ in meaning from the run that is continued: it is then no exact continuation."""
    before = by_meaning(saved) if isinstance(saved, dict) else {}
    scale = rate_scale if before and is_published_run(saved) else 1.0
    for name, now in leaves(config):
        if name in RATES:
            now *= scale
        if name in before and name not in _FREE_SETTINGS and not _equal(before[name], now):
            logger.warning("%s: %s was %r when it was saved and is %r now", path, name, before[name], now)


def _equal(before: Any, now: Any) -> bool:
    if isinstance(now, float) and isinstance(before, int | float):
        return math.isclose(before, now, rel_tol=1e-9)
    return before == now or (isinstance(now, list | tuple) and isinstance(before, list | tuple) and [*before] == [*now])
