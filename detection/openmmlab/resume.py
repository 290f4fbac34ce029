"""Makes a resumed run of mmengine the same as an undisturbed one, in every random number and every image."""

import inspect
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose, InfiniteSampler
from mmengine.dist import broadcast, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, Sampler


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Ties all randomness of training to the seed of the run, and continues where the checkpoint left off.

    mmengine starts a resumed run with fresh random numbers, in another order of the images if the config names no
    seed, and an iteration-based one by loading again every batch of the part that is done. With this hook

    - the order of the images follows from the seed of the run, which the checkpoint holds;
    - the augmentation of an image follows from seed, epoch, process and position, whatever the number of workers;
    - the random numbers of an update (drop path, dropout, the choice of proposals) from seed, process and iteration;
    - an iteration-based run with mmengine's own samplers passes over the finished part without loading it.

    It replaces no setting of a config. Two things it cannot restore: gradients accumulated over a checkpoint, and the
    augmentation by wrappers of data sets (repeating, mixing), which keep mmengine's way.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Prepare the loader; comes after resuming, so seed and iteration are those of the checkpoint."""
        loop = runner.train_loop
        loader, batches = loop.dataloader, loop.dataloader.batch_sampler
        sampler, done = batches.sampler, 0
        seed = runner.cfg.train_dataloader.sampler.get("seed")
        if seed is None:  # the processes share one order, even if their other random numbers differ
            differ = runner.cfg.get("randomness", {}).get("diff_rank_seed", False)
            seed = runner.seed - get_rank() if differ else runner.seed
        if type(sampler) is InfiniteSampler:
            sampler = InfiniteSampler(sampler.dataset, sampler.shuffle, seed)  # from its start
            if type(batches) is BatchSampler:  # others group images by more than their position
                done = runner.iter
        elif hasattr(sampler, "seed"):
            sampler.seed = seed
        batches.sampler = _SeededSampler(sampler, runner.seed, passed_over=done * batches.batch_size)
        if {"sampler", "batch_size", "drop_last"} == set(inspect.signature(type(batches)).parameters):
            # Anew, because one that groups images keeps those that an iterator before this one has left in it.
            batches.__init__(batches.sampler, batches.batch_size, batches.drop_last)
        if isinstance(getattr(loader.dataset, "pipeline", None), Compose):
            loader.dataset.pipeline.transforms.insert(0, _seed_augmentation)
        if isinstance(loop, IterBasedTrainLoop):
            loader._iterator = None  # its workers have the data set as it was; as mmdet does to restart them
            loop.dataloader_iterator = _PassedOver(loop.dataloader_iterator, loader, done)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the update."""
        _seed_everything(runner.seed, get_rank(), runner.iter)


@HOOKS.register_module()
class SameBuffersHook(Hook):
    """Gives all processes the buffers of the first before they evaluate: BatchNorm's statistics, as the checkpoint
    has them. mmengine lets them differ, and with them the score, between the processes."""

    def before_val(self, runner: Runner) -> None:
        """Copy them from the first process."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for buffer in model.buffers():
            broadcast(buffer)


class _SeededIndex(int):
    """Index of a sample, with the seed of its augmentation; mmengine hands it to the pipeline as ``sample_idx``."""

    seed: tuple[int, ...]

    def __new__(cls, index: int, seed: tuple[int, ...]) -> "_SeededIndex":
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __getnewargs__(self) -> tuple[int, tuple[int, ...]]:
        return int(self), self.seed


class _SeededSampler(Sampler):
    """The indices of another sampler, each with the seed of its place in the run."""

    def __init__(self, sampler: Sampler, seed: int, passed_over: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.passed_over = passed_over
        self.dataset = sampler.dataset  # batch samplers look there

    def __iter__(self) -> Iterator[_SeededIndex]:
        place = self.seed, getattr(self.sampler, "epoch", 0), get_rank()
        for position, index in itertools.islice(enumerate(self.sampler), self.passed_over, None):
            yield _SeededIndex(index, (*place, position)) if isinstance(index, int) else index

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class _PassedOver:
    """Takes the place of a loop's iterator, for which the finished batches are gone through without loading them."""

    def __init__(self, batches: Iterator, loader: DataLoader, count: int) -> None:
        batches._iterator = iter(loader)
        self.batches = batches
        self.count = count

    def __next__(self) -> Any:
        if self.count > 0:
            self.count -= 1
            return None
        return next(self.batches)


def _seed_augmentation(results: dict[str, Any]) -> dict[str, Any]:
    """First transform of a pipeline."""
    index = results.get("sample_idx")
    if isinstance(index, _SeededIndex):
        _seed_everything(*index.seed)
    return results


def _seed_everything(*key: int) -> None:
    seeds = np.random.SeedSequence((len(key), *key)).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.manual_seed(int(seeds[2]))
