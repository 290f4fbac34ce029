"""Make a resumed run of mmengine identical to an uninterrupted one, in every random number and every image."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import Compose, InfiniteSampler
from mmengine.dist import broadcast, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Sampler

from ...classification.seeding import seed_everything
from ...kernels.errors import UserError


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Derives all randomness of training from the seed of the run, and continues exactly where the checkpoint ends.

    Without this hook, mmengine resumes with new random numbers and, if the config has no seed, a new order of the
    images. It resumes an iteration-based run by loading every finished batch again. With this hook

    - the order of the images depends on the seed of the run, which the checkpoint holds;
    - the augmentation of an image depends on seed, epoch, process and position, not on the number of workers;
    - the random numbers of an update (drop path, dropout, sampling of proposals) depend on seed, process and iteration;
    - a run that was stopped within an epoch continues at its next batch;
    - finished batches are skipped without loading them, in iteration-based runs with mmengine's own samplers.

    The hook changes no settings. It cannot restore gradients accumulated across a checkpoint, or the augmentation of
    data set wrappers that repeat or mix images.
    """

    priority = "VERY_HIGH"
    finished = 0  # batches of the current epoch

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Read the position within the epoch. Only checkpoints of this hook have one.

        Raises:
            UserError: if updates of another size are resumed within an epoch.
        """
        meta = checkpoint.get("meta", {})
        finished, before = meta.get("finished_batches"), meta.get("update")
        self.finished = finished if type(finished) is int and finished > 0 else 0
        if not runner._resume or not isinstance(before, dict) or before == (now := _update_of(runner)):
            return
        change = f"{runner._load_from or runner.work_dir}: was saved with {before}, but this run has {now}"
        if self.finished and isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise UserError(f"{change}: in the middle of an epoch use the same, or resume from the end of an epoch")
        runner.logger.warning(f"{change}: the run continues, but not exactly")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store the position within the epoch, and the size of an update that it refers to."""
        checkpoint["meta"] |= {"finished_batches": self.finished, "update": _update_of(runner)}

    def before_train(self, runner: Runner) -> None:
        """Prepare the loader. Runs after resuming, so seed and iteration are those of the checkpoint."""
        loop = runner.train_loop
        loader, batches = loop.dataloader, loop.dataloader.batch_sampler
        sampler, done = batches.sampler, self.finished if runner.iter else 0  # 0: only weights were loaded
        seed = runner.cfg.train_dataloader.sampler.get("seed")
        if seed is None:  # all processes use the same order, even if their other random numbers differ
            differ = runner.cfg.get("randomness", {}).get("diff_rank_seed", False)
            seed = runner.seed - get_rank() if differ else runner.seed
        if type(sampler) is InfiniteSampler:
            sampler = InfiniteSampler(sampler.dataset, sampler.shuffle, seed)  # restarted
            done = runner.iter
        elif hasattr(sampler, "seed"):
            sampler.seed = seed
        batches.sampler = _SeededSampler(sampler, runner.seed)
        if {"sampler", "batch_size", "drop_last"} == set(inspect.signature(type(batches)).parameters):
            # Reinitialised, because a sampler that groups images keeps those left by an earlier iterator.
            batches.__init__(batches.sampler, batches.batch_size, batches.drop_last)
        # DataLoader forbids this assignment, because its workers might have been started.
        object.__setattr__(loader, "batch_sampler", _Remaining(batches, done))
        if isinstance(getattr(loader.dataset, "pipeline", None), Compose):
            loader.dataset.pipeline.transforms.insert(0, _seed_augmentation)
        if isinstance(loop, IterBasedTrainLoop):
            loader._iterator = None  # restarts the workers, as mmdet does: they have the unchanged data set
            loop.dataloader_iterator = _SkippingIterator(loop.dataloader_iterator, loader, done)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the update."""
        seed_everything(runner.seed, get_rank(), runner.iter)

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Count the batch."""
        self.finished += 1

    def after_train_epoch(self, runner: Runner) -> None:
        """Start to count again."""
        self.finished = 0


def _update_of(runner: Runner) -> dict[str, int | None]:
    return {"processes": get_world_size(), "images per process": runner.cfg.train_dataloader.get("batch_size")}


@HOOKS.register_module()
class SameBuffersHook(Hook):
    """Copies the buffers of the first process, such as BatchNorm's statistics, to all others before validation.

    mmengine evaluates each process with its own buffers, while a checkpoint holds those of the first.
    """

    def before_val(self, runner: Runner) -> None:
        """Copy the buffers."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for buffer in model.buffers():
            broadcast(buffer)


class _SeededIndex(int):
    """Index of a sample with the seed of its augmentation; mmengine passes it to the pipeline as ``sample_idx``."""

    seed: tuple[int, ...]

    def __new__(cls, index: int, seed: tuple[int, ...]) -> "_SeededIndex":
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int(self), self.seed)


class _SeededSampler(Sampler):
    """The indices of another sampler, each with the seed of its position in the run.

    Args:
        sampler: a sampler of mmengine or mmdet.
        seed: the seed of the run.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.dataset = sampler.dataset  # batch samplers read it

    def __iter__(self) -> Iterator[_SeededIndex]:
        place = self.seed, getattr(self.sampler, "epoch", 0), get_rank()
        for position, index in enumerate(self.sampler):
            yield _SeededIndex(index, (*place, position)) if isinstance(index, int) else index

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class _Remaining(Sampler):
    """The batches of a batch sampler; when they are first iterated, without the first ``count``."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches = batches
        self.count = count

    def __iter__(self) -> Iterator[list]:
        # A generator, so the count is read with the first batch: a loader with workers makes two iterators of it.
        count, self.count = self.count, 0
        yield from itertools.islice(self.batches, count, None)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


class _SkippingIterator:
    """Replaces the iterator of a loop; the first ``count`` batches are None, since the loop skips them."""

    def __init__(self, batches: Any, loader: DataLoader, count: int) -> None:
        batches._iterator = iter(loader)
        self.batches = batches
        self.count = count

    def __next__(self) -> Any:
        if self.count > 0:
            self.count -= 1
            return None
        return next(self.batches)


def _seed_augmentation(results: dict[str, Any]) -> dict[str, Any]:
    """Seed the random numbers of a pipeline, as its first transform."""
    index = results.get("sample_idx")
    if isinstance(index, _SeededIndex):
        seed_everything(*index.seed)
    return results
