"""Training checkpoints, saved atomically and restored strictly."""

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from ..kernels.errors import UserError
from .atomic_write import atomic_write, save
from .config import RATES, by_meaning, images_per_update, is_published_run, leaves, to_plain
from .data import difference
from .distributed import Process
from .environment import report_changes
from .models.weights import (
    WEIGHT_KEYS,
    WeightsError,
    has_ema,
    has_entry,
    load_strictly,
    model_weights,
    read_checkpoint,
    saved_class_names,
    state_dict_of,
)
from .optim import FUSED_OPTIMIZERS, build_optimizer, learning_rate_scale

LATEST, BEST, BEST_EMA = "latest.pth", "best.pth", "best_ema.pth"
KEPT = "update_*.pth"  # the last checkpoints, by the number of their updates
PUBLISHED_LATEST = "latest_ckpt.pth"  # of the published trainer

# Settings that may differ when a run is resumed without changing its results, or whose change is reported elsewhere.
_FREE_SETTINGS = {
    "DATA.CACHE_MODE", "DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.ZIP_MODE", "MODEL.NAME",
    "MODEL.NUM_CLASSES", "MODEL.RESUME", "MODEL.PRETRAINED", "OUTPUT", "PRINT_FREQ", "SAVE_FREQ", "SAVE_MINUTES",
    "KEEP_CHECKPOINTS", "TIMEOUT_MINUTES", "TAG", "EVAL_MODE", "TRAIN.ACCUMULATION_STEPS",
}  # fmt: skip

# Updates that some of timm's optimisers (LAMB, Adan, Lookahead) count in their groups, not per parameter.
_COUNTERS = ("step", "lookahead_step")
# The fix if a run cannot be resumed, also if its checkpoint was found automatically.
_NEW_RUN = "start a new run from its weights, under another --tag, with --pretrained instead of --resume"

logger = logging.getLogger(__name__)


@dataclass
class EpochTotals:
    """Sums over the finished part of an epoch on one process."""

    updates: int = 0
    images: int = 0  # of all processes
    applied: int = 0  # updates that were not skipped
    loss: float = 0.0
    norm: float = 0.0
    unreadable: int = 0
    learning_rate: float = 0.0  # of the last update
    seconds: float = 0.0
    data_seconds: float = 0.0  # part of them spent waiting for data

    def add(self, images: int, loss: float, norm: float | None, unreadable: int, learning_rate: float) -> None:
        """Add an update; a skipped one has no norm."""
        self.updates += 1
        self.images += images
        self.unreadable += unreadable
        self.learning_rate = learning_rate
        if norm is not None:
            self.applied += 1
            self.loss += loss
            self.norm += norm


@dataclass
class TrainingState:
    """Everything that training changes, except random states, which follow from seed, epoch and rank."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    classes: list[str] | None  # names, in the order of the logits; None where the data set has only numbers
    environment: dict[str, str | int] = field(default_factory=dict)  # of ``describe_environment``
    epoch: int = -1  # last finished epoch
    updates: int = 0
    skipped_in_a_row: int = 0
    max_accuracy: float = 0.0
    max_accuracy_ema: float = 0.0
    totals: EpochTotals = field(default_factory=EpochTotals)  # of the epoch after the last finished one


def progress_of(state: TrainingState, process: Process) -> list[dict[str, Any]] | None:
    """What differs between processes within an epoch: totals, and buffers such as BatchNorm's statistics; by rank.

    All processes call it at once. None between epochs, where there are no totals and all buffers are equal.
    """
    if not state.totals.updates:
        return None
    buffers = {name: buffer.cpu().clone() for name, buffer in _buffers(state).items()}
    return process.gather({"totals": asdict(state.totals), "buffers": buffers})


def _buffers(state: TrainingState) -> dict[str, torch.Tensor]:
    """The buffers of the model, and those of the EMA model under ``ema.``."""
    buffers = dict(state.model.named_buffers())
    if state.ema:
        buffers |= {f"ema.{name}": buffer for name, buffer in state.ema.module.named_buffers()}
    return buffers


def save_checkpoint(
    state: TrainingState, config: CfgNode, path: Path, progress: list[dict[str, Any]] | None = None
) -> None:
    """Write a checkpoint atomically.

    Args:
        progress: of ``progress_of``, within an epoch.

    Raises:
        UserError: if it cannot be written; the earlier file is kept.
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
        "environment": state.environment,
        "progress": progress,
        "config": to_plain(config),
    }
    with _reported(path):
        save(content, path)


def save_latest(
    state: TrainingState, config: CfgNode, folder: Path, progress: list[dict[str, Any]] | None = None
) -> None:
    """Write the latest checkpoint. On request keep it under the number of its updates, and then delete the oldest ones.

    Raises:
        UserError: as ``save_checkpoint``.
    """
    save_checkpoint(state, config, folder / LATEST, progress)
    if config.KEEP_CHECKPOINTS == 1:
        return
    path = folder / KEPT.replace("*", f"{state.updates:08d}")
    with _reported(path):
        with atomic_write(path) as unfinished:
            unfinished.unlink(missing_ok=True)  # a link left by a crash, through which a copy would overwrite another
            try:
                os.link(folder / LATEST, unfinished)
            except OSError:  # a file system without links
                shutil.copyfile(folder / LATEST, unfinished)
        for old in kept_checkpoints(folder)[config.KEEP_CHECKPOINTS :]:
            old.unlink()


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of ``KEEP_CHECKPOINTS``, the newest first.

    They are sorted by time, since a run resumed with larger batches counts fewer updates.
    """
    return sorted(folder.glob(KEPT), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn failures to write a checkpoint into UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        kept = "; the previous checkpoint is kept" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({error}){kept}") from error


def restore_checkpoint(
    state: TrainingState,
    config: CfgNode,
    checkpoint: dict[str, Any],
    path: Path,
    updates_per_epoch: int,
    process: Process,
) -> None:
    """Continue from a checkpoint of this trainer or of the published one, where it ends.

    Settings come from ``config``: learning rates and weight decay are not taken from the checkpoint. With the settings
    and the number of processes that it was saved with, the run continues exactly.

    Raises:
        WeightsError: if the weights do not fit.
        UserError: if the checkpoint lacks what training needs, or belongs to other classes or another optimiser.
    """
    missing = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: cannot resume, it holds no {missing[0]}; {_NEW_RUN}")
    _require_same_classes(state, checkpoint, path)
    _require_same_optimizer(config, checkpoint, path)
    load_strictly(state.model, state_dict_of(checkpoint, path), path)
    if state.ema:
        load_strictly(state.ema.module, _ema_state(checkpoint, path), path)
    _load_optimizer(state.optimizer, checkpoint["optimizer"], path)
    if has_entry(checkpoint, "scaler") and state.scaler.is_enabled():
        scaler = {key: _number(checkpoint["scaler"], key, path) for key in state.scaler.state_dict()}
        if not scaler["scale"] > 0:
            raise UserError(f"{path}: cannot resume, its loss is scaled by {scaler['scale']}; {_NEW_RUN}")
        state.scaler.load_state_dict(scaler)
    state.epoch = int(_number(checkpoint, "epoch", path))
    _restore_progress(state, checkpoint.get("progress"), path, config, process)
    state.updates = (state.epoch + 1) * updates_per_epoch + state.totals.updates
    steps = int(_number(checkpoint, "steps", path))
    if steps not in (0, state.updates):  # the published trainer stores 0
        logger.warning(
            "%s: it has made %d updates; with this data, batch size and number of processes they would be %d: "
            "the run continues at the same epoch of the schedule, but not exactly",
            path, steps, state.updates,
        )  # fmt: skip
    state.scheduler.step_update(max(state.updates - 1, 0))
    state.skipped_in_a_row = int(_number(checkpoint, "skipped_in_a_row", path))
    state.max_accuracy = _number(checkpoint, "max_accuracy", path)
    # The published trainer misspells the key of its EMA record.
    ema_key = "max_accuracy_ema" if "max_accuracy_ema" in checkpoint else "max_accuray_ema"
    state.max_accuracy_ema = _number(checkpoint, ema_key, path)
    report_changes(state.environment, checkpoint.get("environment"), path)
    _report_settings(config, checkpoint.get("config"), path, process)


def read_weights(path: Path) -> dict[str, Any]:
    """A checkpoint whose weights, and EMA weights, have the names of the classifier.

    Raises:
        WeightsError: as ``read_checkpoint`` and ``model_weights``.
    """
    checkpoint = read_checkpoint(path)
    weights = {"model": model_weights(checkpoint, path)}
    if has_ema(checkpoint):
        weights["model_ema"] = model_weights(checkpoint, path, ema=True)
    return {key: entry for key, entry in checkpoint.items() if key not in WEIGHT_KEYS} | weights


def load_pretrained(
    model: nn.Module,
    ema: ModelEmaV3 | None,
    checkpoint: dict[str, Any],
    path: Path,
    finetune: bool,
    classes: Sequence[str] | None = None,
) -> None:
    """Load a checkpoint's weights into a model, and its EMA weights, or else the same, into the EMA model.

    If the checkpoint has the same classes in another order, the rows of its classifier are reordered.

    Args:
        finetune: keep the model's classifier if the checkpoint's is for other classes.
        classes: names of the model's classes; None compares only their number.

    Raises:
        WeightsError: if the weights do not fit.
        UserError: if the classifier is for other classes and ``finetune`` is off.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    rows = _rows_to_take(checkpoint, path, len(own["head.weight"]), finetune, classes)

    def fitted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "head.weight" not in state:
            return state
        return {**state, **(own if rows is None else {name: state[name][rows] for name in own if name in state})}

    load_strictly(model, fitted(state_dict_of(checkpoint, path)), path)
    if ema:
        load_strictly(ema.module, fitted(_ema_state(checkpoint, path)), path)


def class_count(checkpoint: Mapping[str, Any], path: Path) -> int | None:
    """Number of classes of a checkpoint's classifier; None if it has none.

    Raises:
        WeightsError: if it holds no weights.
    """
    head = state_dict_of(checkpoint, path).get("head.weight")
    return None if head is None else len(head)


def find_resumable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint in the folder of a run; damaged ones are skipped with a warning.

    This is the latest, which is written last in an epoch. If it is damaged, it is the one with most updates among the
    best ones and the newest intact one of those kept. The folder may belong to the published trainer.
    """
    if latest := _readable(folder / LATEST):
        return latest
    newest_kept = next(filter(None, map(_readable, kept_checkpoints(folder))), None)
    others = (_readable(folder / name) for name in (BEST, BEST_EMA, PUBLISHED_LATEST))

    def steps(found: tuple[Path, dict[str, Any]]) -> float:
        count = found[1].get("steps")
        return count if isinstance(count, int | float) else 0

    return max(filter(None, (newest_kept, *others)), key=steps, default=None)


def _readable(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint with its path; None if there is none, and with a warning if it is damaged."""
    try:
        return (path, read_checkpoint(path)) if path.is_file() else None
    except WeightsError as error:
        logger.warning("skipping a checkpoint that cannot be read: %s", error)
        return None


def _restore_progress(state: TrainingState, progress: Any, path: Path, config: CfgNode, process: Process) -> None:
    """Continue within an epoch: with other processes from the mean of the buffers, at the same image of the epoch.

    Raises:
        UserError: for values that ``progress_of`` does not make.
    """
    if progress is None:
        return
    try:
        zeros = asdict(EpochTotals())
        all_totals = [
            EpochTotals(**{key: type(zero)(_number(entry["totals"], key, path)) for key, zero in zeros.items()})
            for entry in progress
        ]
        own = progress[process.rank] if len(progress) == process.world_size else None
        totals = all_totals[process.rank] if own else all_totals[0]
        for name, buffer in _buffers(state).items():
            saved = [entry["buffers"][name] for entry in ([own] if own else progress)]
            mean = torch.stack(saved).to(torch.float64).mean(0) if len(saved) > 1 else saved[0]
            buffer.copy_(mean.view(buffer.shape))
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot resume, its progress is damaged ({error!s:.200}); {_NEW_RUN}") from error
    per_update = images_per_update(config, process.world_size)
    if totals.images != totals.updates * per_update:
        totals.updates = totals.images // per_update
        totals.images = totals.updates * per_update
        totals.applied = min(totals.applied, totals.updates)
    state.totals = totals


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path: Path) -> None:
    """Load the state of an optimiser; every tensor is copied into one with the layout of its parameter.

    A fused optimiser reads and writes as many elements as its parameter has, whatever the size of the state.

    Raises:
        UserError: if the parameters differ, or the state of one is missing, incomplete or of another shape or type.
    """
    try:
        # timm puts the group without weight decay first, the published trainer last.
        saved_groups = sorted(saved["param_groups"], key=lambda group: group["weight_decay"] > 0)
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
            counters = {key: _counter(saved_group[key], key) for key in _COUNTERS if key in saved_group}
            groups.append({**group, **counters, "params": saved_group["params"]})
            for number, parameter in zip(saved_group["params"], group["params"], strict=True):
                if saved["state"]:
                    values = saved["state"][number]
                    state[number] = {key: _fitted(values[key], key, parameter, group.get("fused")) for key in values}
        if state.keys() != saved["state"].keys():
            raise ValueError("its state is for other parameters")
        names: set[str] = set().union(*state.values())
        for number, values in state.items():
            if optimizer.defaults.get("fused") and (missing := names - values.keys()):
                raise ValueError(f"parameter {number} has no {min(missing)}")
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its optimiser does not fit this run ({error!s:.200}); {_NEW_RUN}") from error


def _counter(value: Any, name: str) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.clone()
    if type(value) is not int:
        raise ValueError(f"{name} is not a number")
    return value


def _fitted(value: Any, name: str, parameter: torch.Tensor, is_fused: bool | None) -> Any:
    """A copy of what an optimiser keeps for a parameter.

    Raises:
        ValueError: if a fused optimiser cannot use it.
    """
    shape = torch.Size() if name == "step" else parameter.shape
    if not isinstance(value, torch.Tensor):
        if is_fused and value is not None:
            raise ValueError(f"{name} is not a tensor")
        return value
    if is_fused and not (value.is_floating_point() and value.shape == shape):
        raise ValueError(
            f"{name} is {tuple(value.shape)} in {value.dtype}, not {tuple(shape)} in a floating-point type"
        )
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _number(values: Any, key: str, path: Path) -> float:
    """A number of a run; 0 if the checkpoint does not have it.

    Raises:
        UserError: for any other value.
    """
    value = values.get(key, 0) if isinstance(values, Mapping) else values
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) not in (int, float) or not -1 <= value < 1e12:
        raise UserError(f"{path}: cannot resume, its {key} is {value!r:.60}; {_NEW_RUN}")
    return value


def _ema_state(checkpoint: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    return state_dict_of(checkpoint, path, key="model_ema" if has_entry(checkpoint, "model_ema") else "model")


def _rows_to_take(
    checkpoint: Mapping[str, Any], path: Path, count: int, finetune: bool, classes: Sequence[str] | None
) -> list[int] | None:
    """For each class of a model, its row in the checkpoint's classifier; None to keep the model's own classifier."""
    saved_count = class_count(checkpoint, path)
    if saved_count is None:
        return None
    saved = saved_class_names(checkpoint, saved_count)
    if saved_count != count:
        reason = f"has {saved_count} classes, but this run has {count}"
    elif saved is None or classes is None:
        return list(range(count))
    elif set(saved) == set(classes):
        return [saved.index(name) for name in classes]
    else:
        reason = f"is for other classes: {difference(classes, saved)}"
    if finetune:
        logger.warning("%s: its classifier is for other classes; a new one is trained instead", path)
        return None
    raise UserError(
        f"{path}: its classifier {reason}; to train a new classifier on top of these weights, add --finetune"
    )


def _require_same_classes(state: TrainingState, checkpoint: Mapping[str, Any], path: Path) -> None:
    count, own_count = class_count(checkpoint, path), len(state.model.state_dict()["head.weight"])
    saved = saved_class_names(checkpoint, count)
    if saved is not None and state.classes is not None and saved != state.classes:
        what = difference(state.classes, saved)
    elif count is not None and count != own_count:
        what = f"it has {count}, but the data has {own_count}"
    else:
        return
    raise UserError(
        f"{path}: cannot resume with other classes: {what}; start a new run under another --output or --tag; "
        "to start it from these weights, use --pretrained with --finetune instead of --resume"
    )


def _require_same_optimizer(config: CfgNode, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Compare optimisers by name, and by the values they keep if the name is unknown or the optimiser is fused."""
    now, saved = config.TRAIN.OPTIMIZER.NAME.lower(), checkpoint.get("config")
    before = by_meaning(saved).get("TRAIN.OPTIMIZER.NAME") if isinstance(saved, dict) else None
    if before is not None and str(before).lower() != now:
        raise UserError(f"{path}: was trained with {before}, not {now}; add --optim {before}, or {_NEW_RUN}")
    if (before is None or now in FUSED_OPTIMIZERS) and (kept := _kept_values(checkpoint["optimizer"])):
        probe = nn.Linear(2, 2)
        optimizer = build_optimizer(config, probe, world_size=1)
        probe(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        if kept != (own := _kept_values(optimizer.state_dict())):
            raise UserError(
                f"{path}: was trained with a different optimiser from {now}: it keeps {', '.join(sorted(kept))}, "
                f"but {now} keeps {', '.join(sorted(own)) or 'nothing'}; give the same --optim, or {_NEW_RUN}"
            )


def _kept_values(optimizer: Any) -> set[str]:
    """Names of the values that an optimiser's state dict has per parameter."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    values = state.values() if isinstance(state, dict) else ()
    return {str(name) for kept in values if isinstance(kept, dict) for name in kept}


def _report_settings(config: CfgNode, saved: Any, path: Path, process: Process) -> None:
    """Warn about settings that differ from the saved ones, so that the run does not continue exactly."""
    before = by_meaning(saved) if isinstance(saved, dict) else {}
    scale = learning_rate_scale(config, process.world_size) if before and is_published_run(saved) else 1.0
    for name, now in leaves(config):
        if name in RATES:
            now *= scale
        if name in before and name not in _FREE_SETTINGS and not _equal(before[name], now):
            logger.warning("%s: %s was %r when it was saved and is now %r", path, name, before[name], now)


def _equal(before: Any, now: Any) -> bool:
    if isinstance(now, float) and isinstance(before, int | float):
        return math.isclose(before, now, rel_tol=1e-9)
    if isinstance(now, list | tuple):
        return isinstance(before, list | tuple) and len(before) == len(now) and all(map(_equal, before, now))
    return isinstance(before, str | int | float | None) and before == now
