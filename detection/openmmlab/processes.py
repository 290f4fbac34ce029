"""Runs OpenMMLab's runner where there is no GPU: processes joined over gloo, no SyncBN."""

import os
import subprocess

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log

from ...kernels.errors import UserError


def process_count(launcher: str) -> int:
    """Processes started by a launcher of mmengine; 1 for ``none``, whatever else runs this one."""
    variables = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}
    return int(os.environ.get(variables.get(launcher, ""), 1))


def prepare_processes(config: Config) -> None:
    """Adapt a config to the devices of this machine; without a GPU also join the processes of the launcher.

    mmengine's launchers choose a GPU before anything else, so that on a CPU the process group has to exist before
    the runner is built; its wrapper for distributed training names a GPU likewise.

    Raises:
        UserError: if the launcher has not started this process, or there are GPUs, but fewer than processes on this
            machine, or none for MPI.
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
                f"each process needs a GPU, there are {torch.cuda.device_count()}: start fewer processes, "
                "or hide the GPUs to use the CPU: CUDA_VISIBLE_DEVICES=-1"
            )
        return
    if config.launcher == "mpi":
        raise UserError("--launcher mpi: works on GPUs only, and PyTorch finds none here; use pytorch or slurm")
    if config.launcher == "slurm":
        _take_environment_from_slurm()
    dist.init_process_group("gloo")
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
    }
    replaced = _replace_norms(config.model)
    if replaced:
        print_log(f"no GPU: {replaced} layers of type SyncBN become BN, which sees one process's share", "current")


def _replace_norms(part: object) -> int:
    """Turn SyncBN, which refuses tensors on the CPU, into BN throughout a config; returns in how many places."""
    children = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    replaced = sum(_replace_norms(child) for child in children)
    if isinstance(part, dict) and part.get("type") == "SyncBN":
        part["type"] = "BN"
        replaced += 1
    return replaced


def _take_environment_from_slurm() -> None:
    nodes = os.environ["SLURM_NODELIST"]
    first = subprocess.run(
        ["scontrol", "show", "hostname", nodes], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
