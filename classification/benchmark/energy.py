"""Energy of a call in joules, from the counter that the device keeps itself."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class NoCounterError(Exception):
    """The device does not tell its energy; the message says why."""


class Counter(Protocol):
    source: str
    shortest: float  # seconds over which a difference means something

    def joules(self) -> float:
        """Energy used since some moment in the past."""


class GpuCounter:
    """NVML's total energy of one GPU, read through the driver's own library."""

    source, shortest = "NVML total energy of the GPU", 1.0  # it is updated some ten times a second

    def __init__(self, device: torch.device) -> None:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NoCounterError(f"NVML cannot be loaded: {error}") from error
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        # By its UUID: NVML counts GPUs in an order of its own, and sees those that CUDA_VISIBLE_DEVICES hides.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(name), ctypes.byref(self._handle))
        self.joules()

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _call(self, function: str, *arguments: object) -> None:
        try:
            status = getattr(self._nvml, function)(*arguments)
        except AttributeError as error:
            raise NoCounterError(f"this driver's NVML has no {function}") from error
        if status:
            raise NoCounterError(f"{function} fails with NVML status {status}")


class CpuCounter:
    """The energy of all processor packages, as Linux reads it from RAPL; other processes count too."""

    source, shortest = "RAPL, all processor packages, whatever else runs on them", 0.1

    def __init__(self, folder: Path = POWERCAP) -> None:
        domains = sorted(folder.glob("intel-rapl:*"))  # others are parts of a package, or the whole machine
        self._packages = [domain for domain in domains if self._read(domain, "name").startswith("package")]
        if not self._packages:
            raise NoCounterError("this system offers no RAPL counters of processor energy")
        self._ranges = [int(self._read(package, "max_energy_range_uj")) for package in self._packages]
        self._last = [int(self._read(package, "energy_uj")) for package in self._packages]
        self._microjoules = 0

    def joules(self) -> float:
        for i, package in enumerate(self._packages):
            now = int(self._read(package, "energy_uj"))
            passed = now - self._last[i]
            self._microjoules += passed if passed >= 0 else passed + self._ranges[i]  # the counter starts over
            self._last[i] = now
        return self._microjoules / 1e6

    def _read(self, domain: Path, name: str) -> str:
        try:
            return (domain / name).read_text()
        except OSError as error:
            raise NoCounterError(f"RAPL's {name} cannot be read: {error.strerror}") from error


def counter_for(device: torch.device) -> Counter:
    """The device's counter, tried once.

    Raises:
        NoCounterError: if there is none, or it cannot be read.
    """
    return GpuCounter(device) if device.type == "cuda" else CpuCounter()


def joules_per_call(call: Callable[[], object], counter: Counter, device: torch.device, seconds: float) -> float:
    """Mean energy of one call, idle power included, over calls one after the other.

    Args:
        seconds: to call for; longer if the counter is too coarse for that, or a call takes longer.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    calls, start, before = 0, time.perf_counter(), counter.joules()
    while calls == 0 or time.perf_counter() - start < max(seconds, counter.shortest):
        call()
        wait()
        calls += 1
    return (counter.joules() - before) / calls
