"""Signals that ask a run to save its state and stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning)."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 does not exist on Windows.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
EXIT_STATUS = 75  # EX_TEMPFAIL: the same command later continues the run

_PARENT = os.getppid()
_received: list[int] = []


class PreemptedError(Exception):
    """The run stops because of a signal.

    Attributes:
        status: for the exit of the process: 130 after Ctrl-C, as for other programs, else ``EXIT_STATUS``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.status = 130 if signal.SIGINT in _received else EXIT_STATUS


@contextmanager
def signals_noted() -> Iterator[None]:
    """Note signals instead of stopping at once; a second Ctrl-C stops at once all the same."""

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in _received:
            raise KeyboardInterrupt
        _received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def is_requested() -> bool:
    """Whether this process has received a signal, or its launcher, torchrun, is gone."""
    is_orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT
    return bool(_received) or is_orphan


def ignore_signals(worker: int) -> None:
    """For loader processes: ignore signals that all processes of a job get; only the parent's SIGTERM ends them."""
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
