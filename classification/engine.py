"""One epoch of training, one exact evaluation, one throughput measurement."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from yacs.config import CfgNode

from ..kernels.errors import UserError
from ..kernels.tensors import compute_dtype_for
from .checkpoint import TrainingState
from .config import images_per_update
from .data import ImageLoader
from .distributed import Process
from .preemption import PreemptedError, is_requested
from .run_log import RunLog
from .seeding import seed_everything
from .stalls import note_progress

logger = logging.getLogger(__name__)

_SAVE, _STOP = 1, 2  # what a process wants after an update


class DivergenceError(UserError):
    """Too many consecutive updates had non-finite values."""


@dataclass(frozen=True)
class Evaluation:
    """Results over a whole split; each image counts once."""

    images: int
    correct1: int
    correct5: int
    loss: float  # mean cross entropy

    @property
    def acc1(self) -> float:
        return 100.0 * self.correct1 / self.images

    @property
    def acc5(self) -> float:
        return 100.0 * self.correct5 / self.images

    def __str__(self) -> str:
        return f"acc@1 {self.acc1:.3f}% ({self.correct1}/{self.images}), acc@5 {self.acc5:.3f}%, loss {self.loss:.4f}"


@torch.no_grad()
def evaluate(model: nn.Module, loader: ImageLoader, process: Process, log: RunLog, title: str = "val") -> Evaluation:
    """Count correct predictions over the loaders of all processes, in float32 whatever the precision of training.

    Raises:
        PreemptedError: in all processes, after a signal to any of them.
        RuntimeError: if the number of images differs from the data set's.
    """
    model.eval()
    loss = images = correct1 = correct5 = 0.0
    is_stopped = False
    for batch, classes, _ in log.progress(loader, len(loader), title):
        if is_stopped := is_requested():
            break
        note_progress()
        classes = classes.to(process.device, non_blocking=True)
        logits = model(batch.to(process.device, non_blocking=True)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
        correct1 += best[:, 0].sum().item()
        correct5 += best.any(dim=1).sum().item()
        loss += nn.functional.cross_entropy(logits, classes, reduction="sum").item()
        images += len(classes)
    images, correct1, correct5, loss, stopped = process.sum([images, correct1, correct5, loss, is_stopped])
    if stopped:
        raise PreemptedError
    if images != len(loader.dataset):
        raise RuntimeError(f"evaluated {images:.0f} images of a split of {len(loader.dataset)}")
    return Evaluation(int(images), int(correct1), int(correct5), loss / images)


@dataclass
class TrainingRun:
    """The fixed parts of a run, and its state."""

    config: CfgNode
    process: Process
    log: RunLog
    state: TrainingState
    model: nn.Module  # the state's model, possibly compiled and wrapped for distributed training
    loader: ImageLoader
    criterion: nn.Module
    mixup: Mixup | None
    updates_per_epoch: int
    dtype: torch.dtype  # of autocast; float32: no autocast
    save: Callable[[], None]  # writes the state within an epoch; called by all processes at once


def train_one_epoch(run: TrainingRun, epoch: int) -> dict[str, float]:
    """Train for the rest of an epoch, numbered from 0; returns the metrics of all of it, over all processes.

    The random numbers of an update depend only on seed, epoch, process and the number of the update. An update whose
    loss or gradient is not finite on any process is skipped on all of them and counted.

    Raises:
        DivergenceError: after ``TRAIN.MAX_SKIPPED_UPDATES`` skipped updates in a row.
        PreemptedError: after a signal, when the state has been saved.
    """
    config, process, state, log = run.config, run.process, run.state, run.log
    totals = state.totals
    run.loader.sampler.epoch, run.loader.sampler.start = epoch, totals.images
    run.model.train()
    teacher = None
    if state.ema and config.AUG.MESA > 0 and epoch >= int(config.AUG.MESA_START * config.TRAIN.EPOCHS):
        teacher = state.ema.module

    batches = _Timed(iter(run.loader))
    images = images_per_update(config, process.world_size)
    first, seconds, data_seconds = totals.updates, totals.seconds, totals.data_seconds
    last_save = start = time.perf_counter()
    title = f"epoch {epoch + 1}/{config.TRAIN.EPOCHS}"
    bar = log.progress(range(first, run.updates_per_epoch), run.updates_per_epoch - first, title)
    for update in bar:
        seed_everything(config.SEED, epoch, process.rank, update)
        learning_rate = state.optimizer.param_groups[0]["lr"]
        loss, grad_norm, damaged = _update(run, batches, teacher)
        note_progress()
        totals.add(images, loss, grad_norm, damaged, learning_rate)

        now = time.perf_counter()
        elapsed, done = now - start, update + 1 - first
        totals.seconds, totals.data_seconds = seconds + elapsed, data_seconds + batches.seconds
        speed = images * done / elapsed
        figures = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/gradient_norm": float("nan") if grad_norm is None else grad_norm,
            "train/images_per_second": speed,
            "train/data_time": batches.seconds / done,
        }
        log.scalars(figures, state.updates)
        left = (config.TRAIN.EPOCHS - epoch) * run.updates_per_epoch - update - 1
        eta = tqdm.format_interval(left * elapsed / done)
        bar.set_postfix_str(f"loss {loss:.3f}, training ends in {eta}", refresh=False)
        if (update + 1) % config.PRINT_FREQ == 0 and not log.shows_bars:
            logger.info(
                "epoch %d/%d update %d/%d loss %.4f lr %.2e grad norm %.3f %.1f images/s data %.0f%% eta %s",
                epoch + 1, config.TRAIN.EPOCHS, update + 1, run.updates_per_epoch, loss,
                learning_rate, figures["train/gradient_norm"], speed,
                100 * batches.seconds / elapsed, eta,
            )  # fmt: skip

        is_due = process.is_main and 0 < 60 * config.SAVE_MINUTES < now - last_save
        wish = process.largest(_STOP if is_requested() else _SAVE if is_due else 0)
        if wish:
            run.save()
            last_save = time.perf_counter()
        if wish == _STOP:
            raise PreemptedError

    unreadable, loss_sum = process.sum([totals.unreadable, totals.loss])
    return {
        "train_loss": loss_sum / process.world_size / totals.applied if totals.applied else float("nan"),
        "gradient_norm": totals.norm / totals.applied if totals.applied else float("nan"),
        "learning_rate": totals.learning_rate,
        "updates": state.updates,
        "skipped_updates": totals.updates - totals.applied,
        "unreadable_images": int(unreadable),
        "images_per_second": totals.images / totals.seconds if totals.seconds else float("nan"),
        "data_seconds": totals.data_seconds,
        "train_seconds": totals.seconds,
        "peak_memory_mb": peak_memory(process.device) / 2**20,
    }


def _update(run: TrainingRun, batches: Iterator, teacher: nn.Module | None) -> tuple[float, float | None, int]:
    """Make one optimiser update.

    Returns:
        The loss of this process, the gradient norm (None if the update was skipped), and the number of damaged images
        that were replaced.
    """
    config, state, device = run.config, run.state, run.process.device
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    # A forward pass with NaN would leave it in BatchNorm's running statistics even if the update is skipped.
    buffers = list(state.model.buffers())
    before = [buffer.clone() for buffer in buffers]

    total = torch.zeros((), device=device)
    damaged = 0
    for step in range(accumulation):
        images, classes, skipped_images = next(batches)
        note_progress()
        damaged += int(skipped_images.sum())
        images, targets = images.to(device, non_blocking=True), classes.to(device, non_blocking=True)
        if run.mixup:
            images, targets = run.mixup(images, targets)
        is_last = step == accumulation - 1
        unsynced = None if is_last or not isinstance(run.model, DistributedDataParallel) else run.model
        with unsynced.no_sync() if unsynced else contextlib.nullcontext():
            with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
                logits = run.model(images)
            loss = run.criterion(_at_least_float32(logits), targets)
            if teacher is not None:
                loss = loss + config.AUG.MESA * _self_distillation(logits, images, teacher, run.dtype)
            # A non-finite loss makes all gradients NaN. All processes have the same gradient norm, so each of them
            # sees the failure.
            verdict = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
            state.scaler.scale(loss * verdict / accumulation).backward()
        total += loss.detach() / accumulation

    state.scaler.unscale_(state.optimizer)
    limit = config.TRAIN.CLIP_GRAD or float("inf")
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    loss_value, norm_value = torch.stack([total, norm]).tolist()
    applied = math.isfinite(norm_value)
    if applied:
        state.scaler.step(state.optimizer)
        state.skipped_in_a_row = 0
        if state.ema:
            state.ema.update(state.model)
    else:
        torch._foreach_copy_(buffers, before)
        state.skipped_in_a_row += 1
    state.scaler.update()
    state.optimizer.zero_grad()
    state.scheduler.step_update(state.updates)  # as published: updates 0 and 1 both have the rate of position 0
    state.updates += 1
    if state.skipped_in_a_row >= config.TRAIN.MAX_SKIPPED_UPDATES:
        remedy = "" if run.dtype == torch.float32 else ", or train with --disable_amp"
        raise DivergenceError(
            f"{state.skipped_in_a_row} updates in a row had a non-finite loss or gradient (last loss {loss_value}); "
            f"the last good checkpoint is kept: lower TRAIN.BASE_LR{remedy}"
        )
    return loss_value, norm_value if applied else None, damaged


def _self_distillation(logits: Tensor, images: Tensor, teacher: nn.Module, dtype: torch.dtype) -> Tensor:
    """MESA: soft cross entropy against the EMA model's prediction on the same augmented images."""
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        prediction = teacher(images)
    return SoftTargetCrossEntropy()(_at_least_float32(logits), _at_least_float32(prediction).softmax(dim=-1))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype_for(tensor))


@torch.no_grad()
def measure_throughput(
    model: Any, batch_size: int, size: int, device: torch.device, dtype: torch.dtype, seconds: float = 3.0
) -> tuple[float, float]:
    """Measure inference on this process: images/s, and peak memory in bytes.

    Args:
        model: a ``SpatialMamba``, which may be compiled.
        batch_size: images per step, random numbers of shape (in_chans, size, size).
        dtype: of autocast; float32 for no autocast.
        seconds: duration, after three steps of warm-up.
    """
    model.eval()
    images = torch.randn(batch_size, model.in_chans, size, size, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        note_progress()

    for _ in range(3):
        step()
    if device.type == "cuda":  # not earlier: cuDNN's search for algorithms takes memory that the model does not need
        torch.cuda.reset_peak_memory_stats(device)
    steps, start = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return batch_size * steps / (time.perf_counter() - start), peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on a GPU; on a CPU, of this process's resident memory (0 on Windows: not measured)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Timed:
    """An iterator that measures the time spent waiting for items."""

    def __init__(self, iterator: Iterator) -> None:
        self._iterator = iterator
        self.seconds = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self):  # noqa: ANN204 - whatever the iterator yields
        start = time.perf_counter()
        item = next(self._iterator)
        self.seconds += time.perf_counter() - start
        return item
