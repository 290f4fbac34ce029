"""The processes of a run: rank, device, sums over all of them."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.errors import UserError
from .command_line import chosen_device


@dataclass(frozen=True)
class Process:
    """One process of a run: rank, number of processes and device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all processes, in float64: exact for counts up to 2**53."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; tensors must be on the CPU."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group together: a process that leaves early can break the last operation of the others."""
        if not dist.is_initialized():
            return
        store = shared_store("leaving")
        with suppress(RuntimeError):  # another process is gone, or does not come
            store.set(str(self.rank), "")
            store.wait([str(rank) for rank in range(self.world_size)], timedelta(seconds=10))
        dist.destroy_process_group()


def shared_store(name: str) -> dist.Store:
    """Keys and values that the processes of the group share, apart from those under other names."""
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def start_process(device: str, timeout_minutes: float) -> Process:
    """Join the process group of the launcher, if there is one: NCCL on GPUs, gloo on CPUs.

    Args:
        device: ``auto`` (a GPU if there is one), ``cuda`` or ``cpu``.
        timeout_minutes: longest time that a collective operation may take.

    Raises:
        UserError: if there is no such device.
    """
    rank, world_size = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    this_device = chosen_device(device)
    on_gpu = this_device.type == "cuda"
    if on_gpu:
        wanted, present = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > present:
            raise UserError(
                f"{wanted} processes on this machine need a GPU each, but there are {present}; lower --nproc_per_node"
            )
        this_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(this_device)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=this_device if on_gpu else None,
        )
    return Process(rank, world_size, this_device)
