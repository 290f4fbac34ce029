"""Prepare OpenMMLab's runner for machines without a GPU: process groups over gloo, no SyncBN."""

import os
import subprocess

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log

from ...kernels.errors import UserError


def process_count(launcher: str) -> int:
    """Number of processes that a launcher of mmengine has started; 1 for ``none``."""
    variables = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}
    return int(os.environ.get(variables.get(launcher, ""), 1))


def prepare_processes(config: Config) -> None:
    """Adapt a config to the devices of this machine; without a GPU also initialise the process group.

    mmengine's launchers and its wrapper for distributed training assume a GPU. On a CPU the process group must
    therefore exist before the runner is built, and the config must set the wrapper.

    Raises:
        UserError: if the launcher did not start this process, if this machine has GPUs but fewer than processes, or
            if the launcher is MPI and there is no GPU.
    """
    if config.launcher == "none":
        return
    variables = {"pytorch": "RANK", "slurm": "SLURM_PROCID"}
    if variables.get(config.launcher, "PATH") not in os.environ:
        raise UserError(f"--launcher {config.launcher}: start the processes with the dist_*.sh or slurm_*.sh scripts")
    local_rank = int(os.environ.get("SLURM_LOCALID" if config.launcher == "slurm" else "LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"each process needs a GPU, but there are {torch.cuda.device_count()}: start fewer processes, "
                "or hide the GPUs to use the CPU: CUDA_VISIBLE_DEVICES=-1"
            )
        return
    if config.launcher == "mpi":
        raise UserError("--launcher mpi: needs a GPU, and PyTorch finds none; use pytorch or slurm")
    if config.launcher == "slurm":
        _set_environment_from_slurm()
    dist.init_process_group("gloo")
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
    }
    replaced = _replace_norms(config.model)
    if replaced:
        print_log(f"no GPU: {replaced} layers of type SyncBN become BN, with statistics of one process", "current")


def _replace_norms(part: object) -> int:
    """Replace SyncBN, which does not support CPUs, with BN throughout a config; returns the number of replacements."""
    children = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    replaced = sum(_replace_norms(child) for child in children)
    if isinstance(part, dict) and part.get("type") == "SyncBN":
        part["type"] = "BN"
        replaced += 1
    return replaced


def _set_environment_from_slurm() -> None:
    nodes = os.environ["SLURM_NODELIST"]
    first = subprocess.run(
        ["scontrol", "show", "hostname", nodes], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
