"""What the results of a run depend on besides its config: processes, device, threads, kernels, PyTorch.

Checkpoints record it. A resumed run reports what has changed, and keeps the total batch.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from ..kernels.backends import serving
from .config import by_meaning, images_per_update
from .distributed import Process

logger = logging.getLogger(__name__)


def make_deterministic() -> None:
    """Select deterministic algorithms, and one thread: the order of sums depends on the number of threads.

    Must be called before CUDA starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)


def describe_environment(config: CfgNode, process: Process) -> dict[str, str | int]:
    """The facts to record in a checkpoint."""
    if process.device.type == "cuda":
        device = torch.cuda.get_device_name(process.device)
        capability = torch.cuda.get_device_capability(process.device)
        threads = {}
    else:
        device, capability = f"CPU with {torch.backends.cpu.get_cpu_capability()}", None
        threads = {"threads": torch.get_num_threads()}
    return {
        "total batch": images_per_update(config, process.world_size),
        "processes": process.world_size,
        "device": device,
        **threads,
        "kernels": serving(process.device.type, torch.float32, capability),
        "PyTorch": str(torch.__version__),  # a subclass of str, which a checkpoint must not hold
    }


def report_changes(now: Mapping[str, Any], saved: Any, path: Path) -> None:
    """Warn in one line if the environment is not that of the checkpoint. Older checkpoints do not record theirs.

    The total batch is reported by ``keep_total_batch``.
    """
    before = saved if isinstance(saved, dict) else {}
    changes = [
        f"{name} {before[name]}, now {value}"
        for name, value in now.items()
        if name != "total batch" and isinstance(before.get(name), str | int) and before[name] != value
    ]
    if changes:
        logger.warning("%s: the run continues, but not bit for bit (%s)", path, "; ".join(changes))


def keep_total_batch(config: CfgNode, checkpoint: Mapping[str, Any], process: Process) -> CfgNode:
    """The config to resume with: with another number of processes, accumulation steps that keep the total batch.

    A batch size or accumulation steps that differ from the checkpoint's config were changed on purpose, and are kept.
    One line reports what is done.
    """
    saved, settings = checkpoint.get("environment"), checkpoint.get("config")
    before = saved.get("total batch") if isinstance(saved, dict) else None
    images, now = config.DATA.BATCH_SIZE * process.world_size, images_per_update(config, process.world_size)
    if type(before) is not int or before < 1 or before == now or not isinstance(settings, dict):
        return config
    given = by_meaning(settings)
    if given.get("DATA.BATCH_SIZE") != config.DATA.BATCH_SIZE:
        reason = "DATA.BATCH_SIZE has changed"
    elif given.get("TRAIN.ACCUMULATION_STEPS") != config.TRAIN.ACCUMULATION_STEPS:
        reason = "TRAIN.ACCUMULATION_STEPS has changed"
    elif before % images:
        reason = f"the {process.world_size} x {config.DATA.BATCH_SIZE} images of a step do not divide it"
    else:
        config = config.clone()
        config.defrost()
        config.TRAIN.ACCUMULATION_STEPS = before // images
        config.freeze()
        logger.info("the total batch of %d is kept: %d accumulation steps", before, before // images)
        return config
    rates = "are scaled with it" if config.TRAIN.SCALE_LR else "stay, as TRAIN.SCALE_LR is False"
    logger.warning("the total batch changes from %d to %d, because %s; learning rates %s", before, now, reason, rates)
    return config
