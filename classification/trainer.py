"""The jobs of the trainer. Everything that can fail is done while a job is prepared, before it runs."""

import copy
import gc
import logging
import warnings
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from ..kernels.errors import UserError
from .atomic_write import lock
from .checkpoint import (
    BEST,
    BEST_EMA,
    LATEST,
    PUBLISHED_LATEST,
    EpochTotals,
    TrainingState,
    class_count,
    find_resumable,
    kept_checkpoints,
    load_pretrained,
    progress_of,
    read_weights,
    restore_checkpoint,
    save_checkpoint,
    save_latest,
)
from .data import ImageLoader, build_mixup, build_train_loader, build_val_loader, check_classes, check_number
from .distributed import Process, start_process
from .engine import Evaluation, TrainingRun, evaluate, measure_throughput, train_one_epoch
from .environment import describe_environment, keep_total_batch, make_deterministic
from .models.spatial_mamba import SpatialMamba
from .models.weights import read_checkpoint, saved_class_names
from .optim import autocast_dtype, build_criterion, build_optimizer, build_scheduler
from .preemption import PreemptedError, signals_noted
from .run_log import METRICS, RunLog, set_up_console
from .seeding import seed_everything

logger = logging.getLogger(__name__)


class Job(Protocol):
    """A prepared job."""

    process: Process

    def run(self) -> None:
        """Do the work."""


def prepare(config: CfgNode, notes: list[str]) -> Job:
    """Build the job of a config: a throughput measurement, an evaluation or a training.

    All processes find the same errors here, before any file is written.

    Args:
        config: checked and frozen.
        notes: lines for the log, on ignored config keys.

    Raises:
        UserError, WeightsError: naming what is wrong and the fix.
    """
    kind = ThroughputJob if config.THROUGHPUT_MODE else EvaluationJob if config.EVAL_MODE else TrainingJob
    if kind is not ThroughputJob and not config.DATA.DATA_PATH:
        raise UserError("--data-path is missing: the folder that holds the train and val splits")
    if kind is EvaluationJob and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        raise UserError("no checkpoint to evaluate: add --pretrained FILE")
    if config.DETERMINISTIC:
        make_deterministic()  # before CUDA starts
    process = start_process(config.DEVICE, 2 * config.TIMEOUT_MINUTES)  # stalls_watched reports earlier
    set_up_console(process.is_main)
    for note in notes:
        logger.warning(note)
    if process.device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    seed_everything(config.SEED)  # the same initial weights in every process
    return kind(config, process)


def build_model(config: CfgNode, num_classes: int) -> SpatialMamba:
    """The classifier that a config describes.

    Raises:
        UserError: naming the config key whose value the model refuses.
    """
    model = config.MODEL.SPATIAL_MAMBA
    sizes = model.FUSION_KERNEL_SIZES
    try:
        return SpatialMamba(
            in_chans=model.IN_CHANS,
            num_classes=num_classes,
            dims=model.EMBED_DIM,
            depths=tuple(model.DEPTHS),
            d_state=model.D_STATE,
            mlp_ratio=model.MLP_RATIO,
            drop_rate=config.MODEL.DROP_RATE,
            drop_path_rate=config.MODEL.DROP_PATH_RATE,
            use_checkpoint=config.TRAIN.USE_CHECKPOINT,
            fusion_dilations=tuple(model.FUSION_DILATIONS),
            fusion_kernel_sizes=sizes[0] if len(sizes) == 1 else tuple(sizes),
        )
    except ValueError as error:
        raise UserError(f"MODEL.SPATIAL_MAMBA: {error}") from error


class ThroughputJob:
    """Speed and memory of inference at each batch size; needs no data."""

    def __init__(self, config: CfgNode, process: Process) -> None:
        self.config, self.process = config, process
        self.model = build_model(config, config.MODEL.NUM_CLASSES or 1000).to(process.device)
        if config.MODEL.PRETRAINED:
            path = Path(config.MODEL.PRETRAINED)
            load_pretrained(self.model, None, read_weights(path), path, config.MODEL.FINETUNE)

    def run(self) -> None:
        config, device = self.config, self.process.device
        dtype = autocast_dtype(config, device)
        model = torch.compile(self.model, dynamic=False) if config.COMPILE else self.model
        for batch_size in sorted(config.THROUGHPUT_BATCHES or [config.DATA.BATCH_SIZE]):
            speed, memory = measure_throughput(model, batch_size, config.DATA.IMG_SIZE, device, dtype)
            logger.info(
                "throughput: batch %d, %d px, %s, %s: %.1f images/s per process, peak memory %.0f MB",
                batch_size, config.DATA.IMG_SIZE, device.type, str(dtype).removeprefix("torch."), speed,
                memory / 2**20,
            )  # fmt: skip


class EvaluationJob:
    """Accuracy of a checkpoint, and of its EMA weights if it has any; writes no files.

    The classes of the data are matched with the checkpoint's by name, and may be a subset. If either has no names,
    classes are matched by number.
    """

    def __init__(self, config: CfgNode, process: Process) -> None:
        self.process = process
        self.path = Path(config.MODEL.PRETRAINED or config.MODEL.RESUME)
        checkpoint = read_weights(self.path)
        count = class_count(checkpoint, self.path)
        known = saved_class_names(checkpoint, count)
        self.loader = build_val_loader(config, process, known)
        reader = self.loader.dataset.reader
        found, num_classes = len(reader.classes), count or len(reader.classes)
        if found > num_classes or (found < num_classes and reader.has_names and known is None):
            raise UserError(
                f"{config.DATA.DATA_PATH}: the data set has {found} classes, but the classifier of {self.path} has "
                f"{num_classes}; evaluate it on the classes it was trained on"
            )
        check_number(config, num_classes, f"{self.path}: its classifier")
        if found < num_classes:
            logger.info("%s: %d of the %d classes of the model", config.DATA.DATA_PATH, found, num_classes)
        self.model = build_model(config, num_classes).to(process.device)
        self.ema = ModelEmaV3(self.model) if checkpoint.get("model_ema") else None
        load_pretrained(self.model, self.ema, checkpoint, self.path, finetune=False)

    def run(self) -> None:
        _validate(self.model, self.ema, self.loader, self.process, RunLog(self.process), str(self.path))


class TrainingJob:
    """Training from scratch, from pretrained weights, or continued from a checkpoint."""

    def __init__(self, config: CfgNode, process: Process) -> None:
        self.config, self.process = config, process
        self._lock: IO[str] | None = None
        if config.COMPILE and config.TRAIN.USE_CHECKPOINT and process.device.type == "cpu":
            # PyTorch 2.11: Inductor's backward pass of two checkpointed blocks ends in a segmentation fault.
            raise UserError("--compile with --use-checkpoint crashes PyTorch on a CPU; remove one of them")
        if (Path(config.OUTPUT) / PUBLISHED_LATEST).is_file():
            raise UserError(
                f"--output {config.OUTPUT}: is the folder of one run of the published trainer; name another folder, "
                f"and continue that run with --resume {Path(config.OUTPUT) / PUBLISHED_LATEST}"
            )
        self.folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
        found = self._find_checkpoint()
        if found:  # saved files keep the given config: with it, the next resume decides again
            config = keep_total_batch(config, found[1], process)
        train_loader = build_train_loader(config, process)
        self.val_loader = build_val_loader(config, process)
        reader, val_reader = train_loader.dataset.reader, self.val_loader.dataset.reader
        others = val_reader.classes
        if not (reader.has_names or val_reader.has_names):  # numbers, of which val may lack the last
            others = [*others, *reader.classes[len(others) :]]
        num_classes = check_classes(config, reader.classes, others)
        classes = reader.classes if reader.has_names else None

        model = build_model(config, num_classes).to(process.device)
        ema = ModelEmaV3(model, decay=config.TRAIN.MODEL_EMA_DECAY) if config.TRAIN.MODEL_EMA else None
        optimizer = build_optimizer(config, model, process.world_size)
        updates_per_epoch = len(train_loader) // config.TRAIN.ACCUMULATION_STEPS
        dtype = autocast_dtype(config, process.device)
        self.state = TrainingState(
            model,
            ema,
            optimizer,
            build_scheduler(config, optimizer, updates_per_epoch, process.world_size),
            torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16),
            classes,
            describe_environment(config, process),
        )
        self.pretrained: tuple[SpatialMamba, ModelEmaV3 | None] | None = None
        if config.MODEL.PRETRAINED:
            path = Path(config.MODEL.PRETRAINED)
            load_pretrained(model, ema, read_weights(path), path, config.MODEL.FINETUNE, classes)
            self.pretrained = model, ema
        self.resumed_from: Path | None = None
        if found:
            self.pretrained = copy.deepcopy(self.pretrained)  # evaluated first
            self.resumed_from, checkpoint = found
            restore_checkpoint(self.state, config, checkpoint, self.resumed_from, updates_per_epoch, process)
        criterion, mixup = build_criterion(config), build_mixup(config, num_classes)
        log = self._open_folder()
        compiled: Any = torch.compile(model) if config.COMPILE else model
        self.training = TrainingRun(
            config,
            process,
            log,
            self.state,
            _parallel(compiled, process),
            train_loader,
            criterion,
            mixup,
            updates_per_epoch,
            dtype,
            self._save_within_epoch,
        )

    def run(self) -> None:
        config, state, log = self.config, self.state, self.training.log
        logger.info(
            "%s: %.2fM parameters, %d training and %d validation images, %d process(es) on %s in %s, output %s",
            config.MODEL.NAME, sum(p.numel() for p in state.model.parameters()) / 1e6,
            len(self.training.loader.dataset), len(self.val_loader.dataset), self.process.world_size,
            self.process.device.type, str(self.training.dtype).removeprefix("torch."), self.folder,
        )  # fmt: skip
        gc.freeze()  # otherwise each full collection of a long run visits the modules of PyTorch and all file names
        try:
            with signals_noted():
                if self.pretrained:
                    _validate(*self.pretrained, self.val_loader, self.process, log, config.MODEL.PRETRAINED)
                    self.pretrained = None
                self._report_start()
                for epoch in range(state.epoch + 1, config.TRAIN.EPOCHS):
                    self._run_epoch(epoch)
            best_ema = f", of its EMA {state.max_accuracy_ema:.3f}%" if state.ema else ""
            logger.info("finished: best acc@1 of the model %.3f%%%s", state.max_accuracy, best_ema)
        except PreemptedError:
            logger.warning("stopped by a signal; the same command continues this run")
            raise
        finally:
            gc.unfreeze()
            log.close()
            if self._lock:
                self._lock.close()

    def _report_start(self) -> None:
        """Log which weights the training starts from."""
        given = {"--resume": self.config.MODEL.RESUME, "--pretrained": self.config.MODEL.PRETRAINED}
        if not self.resumed_from:
            logger.info("training starts from %s", given["--pretrained"] or "initial weights")
            return
        finished, updates = self.state.epoch + 1, self.state.totals.updates
        position = f"in epoch {finished + 1}, after {updates} of its updates" if updates else f"after epoch {finished}"
        logger.info("resumed from %s %s", self.resumed_from, position)
        if self.state.epoch + 1 >= self.config.TRAIN.EPOCHS:
            logger.warning(
                "%s: this run is finished; raise --epochs, or start a new run under another --output or --tag",
                self.folder,
            )
        for option, file in given.items():
            if file and Path(file) != self.resumed_from:
                logger.warning(
                    "training does not start from %s %s, because %s holds a run; for a new run choose another --tag",
                    option, file, self.folder,
                )  # fmt: skip

    def _run_epoch(self, epoch: int) -> None:
        config, state, process, log = self.config, self.state, self.process, self.training.log
        record = {"epoch": epoch, **train_one_epoch(self.training, epoch)}
        progress = progress_of(state, process)
        if process.world_size > 1:
            # Now all processes hold the same model, so the evaluated model is the saved one.
            for model in (state.model, *([state.ema.module] if state.ema else [])):
                distribute_bn(model, process.world_size, reduce=True)
        title = f"epoch {epoch + 1}/{config.TRAIN.EPOCHS}"
        try:
            result, ema_result = _validate(state.model, state.ema, self.val_loader, process, log, title)
        except PreemptedError:
            if process.is_main:
                save_latest(state, config, self.folder, progress)
            raise
        state.totals = EpochTotals()
        names = []
        if result.acc1 >= state.max_accuracy:
            state.max_accuracy = result.acc1
            names.append(BEST)
        record |= {"val_acc1": result.acc1, "val_acc5": result.acc5, "val_loss": result.loss}
        if ema_result:
            if ema_result.acc1 >= state.max_accuracy_ema:
                state.max_accuracy_ema = ema_result.acc1
                names.append(BEST_EMA)
            record |= {"ema_acc1": ema_result.acc1, "ema_acc5": ema_result.acc5, "ema_loss": ema_result.loss}
        record |= {"max_accuracy": state.max_accuracy, "max_accuracy_ema": state.max_accuracy_ema}
        state.epoch = epoch

        logger.info(
            "epoch %d/%d loss %.4f grad norm %.3f %.1f images/s data %.1fs of %.1fs, skipped updates %d, unreadable %d",
            epoch + 1, config.TRAIN.EPOCHS, record["train_loss"], record["gradient_norm"],
            record["images_per_second"], record["data_seconds"], record["train_seconds"], record["skipped_updates"],
            record["unreadable_images"],
        )  # fmt: skip
        log.scalars({k.replace("_", "/", 1): v for k, v in record.items() if k[:4] in ("val_", "ema_")}, state.updates)
        if process.is_main:
            for name in names:
                save_checkpoint(state, config, self.folder / name)
            if (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS:
                save_latest(state, config, self.folder)
        log.epoch(record)  # last: a folder with a record but no checkpoint would be refused as another run
        process.barrier()

    def _save_within_epoch(self) -> None:
        progress = progress_of(self.state, self.process)
        if self.process.is_main:
            save_latest(self.state, self.config, self.folder, progress)
            logger.info("saved after update %d of the epoch", self.state.totals.updates)

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to continue from, if any."""
        config = self.config
        if config.TRAIN.AUTO_RESUME and (found := find_resumable(self.folder)):
            return found
        if config.MODEL.RESUME:
            path = Path(config.MODEL.RESUME)
            return path, read_checkpoint(path)
        return None

    def _open_folder(self) -> RunLog:
        """Lock the folder of the run, and open its records."""
        config, process, folder = self.config, self.process, self.folder
        names = (LATEST, BEST, BEST_EMA, METRICS)
        records = (*kept_checkpoints(folder), *(folder / name for name in names))
        if not self.resumed_from and any(path.exists() for path in records):
            remedy = "remove it" if config.TRAIN.AUTO_RESUME else "let it resume (TRAIN.AUTO_RESUME True)"
            raise UserError(
                f"{folder}: holds a run that would be overwritten; choose another --output or --tag, or {remedy}"
            )
        # Otherwise a process could mistake the folder just created by another process for an earlier run.
        if process.sum([self.state.epoch])[0] != process.world_size * self.state.epoch:
            raise UserError(
                f"{folder}: the processes find different checkpoints; --output must be a folder that all of them share"
            )
        if not process.is_main:
            return RunLog(process)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Processes may outlive a killed launcher and still write; the lock ends with the process that holds it.
            self._lock = (folder / ".lock").open("w")
            lock(self._lock)
            (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
            return RunLog(process, folder, self.state.updates + 1, self.state.epoch + 1)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another training run writes here; stop it or choose another --tag") from error
        except OSError as error:
            raise UserError(f"--output {folder}: cannot be written ({error})") from error


def _parallel(model: nn.Module, process: Process) -> nn.Module:
    if process.world_size == 1:
        return model
    # In channels-last memory, gradients of 1x1 and depthwise convolutions differ from the weights only in the strides
    # of dimensions of size 1, which costs nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        device_ids=[process.device.index] if process.device.type == "cuda" else None,
        broadcast_buffers=False,  # BatchNorm statistics are averaged once, at the end of the epoch
        gradient_as_bucket_view=True,
    )


def _validate(
    model: nn.Module, ema: ModelEmaV3 | None, loader: ImageLoader, process: Process, log: RunLog, title: str
) -> tuple[Evaluation, Evaluation | None]:
    result = evaluate(model, loader, process, log, "val")
    logger.info("%s: model %s", title, result)
    if ema is None:
        return result, None
    ema_result = evaluate(ema.module, loader, process, log, "val EMA")
    logger.info("%s: EMA   %s", title, ema_result)
    return result, ema_result
