"""Stop a run of mmengine on a signal, with a checkpoint to continue from."""

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...classification.atomic_write import atomic_write
from ...classification.preemption import PreemptedError, ignore_signals, is_requested, signals_noted


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Saves a checkpoint after SIGTERM, SIGUSR1 or Ctrl-C, and ends the process with status 75 (130 after Ctrl-C).

    The signal may reach any of the processes. It takes effect before the next iteration, so after a validation in
    progress. ``--resume`` continues the run from ``preempted_iter_N.pth`` in the work folder: exactly, also within an
    epoch, if ``ExactResumeHook`` is used.
    """

    priority = "HIGHEST"  # before ExactResumeHook, which restarts the loader processes

    def before_train(self, runner: Runner) -> None:
        """Note signals from now on. Loader processes ignore them."""
        self._signals = ExitStack()
        self._signals.enter_context(signals_noted())
        loader = runner.train_loop.dataloader
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Save and stop if a process has received a signal."""
        wish = torch.tensor(float(is_requested()), device=get_device())
        all_reduce(wish, "max")
        if not wish:
            return
        name = f"preempted_iter_{runner.iter}.pth"
        runner.save_checkpoint(runner.work_dir, name, meta=dict(epoch=runner.epoch, iter=runner.iter))
        path = Path(runner.work_dir, name)
        if runner.rank == 0:
            with atomic_write(path.with_name("last_checkpoint")) as unfinished:
                unfinished.write_text(str(path))
        runner.logger.warning(f"stopped by a signal; --resume continues this run from {path}")
        barrier()  # a launcher kills the others when the first process ends
        sys.exit(PreemptedError().status)

    def after_train(self, runner: Runner) -> None:
        """Signals act as before."""
        self._signals.close()


def _start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    ignore_signals(worker)
    if init is not None:
        init(worker)
