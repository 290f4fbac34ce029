"""Kill training at random points, fail its writes, damage its checkpoints: ``make torture``.

Every restart must resume, and the final weights must equal those of an undisturbed run, bit for bit. Processes are
forked from this one, which has imported everything, so hundreds of kills take minutes.
"""

import argparse
import errno
import functools
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.tensorboard import SummaryWriter

from spatial_mamba.classification import run_log
from spatial_mamba.classification.checkpoint import LATEST
from spatial_mamba.classification.demo_data import write_digits
from spatial_mamba.classification.main import main as train
from spatial_mamba.classification.models.weights import WeightsError, read_checkpoint

from .classification.runs import assert_same, copy_photos

CONFIG = """
DATA: {IMG_SIZE: 32, BATCH_SIZE: 2, NUM_WORKERS: 0}
MODEL: {NAME: micro, DROP_PATH_RATE: 0.2, SPATIAL_MAMBA: {EMBED_DIM: 4, DEPTHS: [1, 1, 1, 1]}}
TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 0.05, MODEL_EMA_DECAY: 0.5}
AUG: {MESA: 1.0, MESA_START: 0.5}
SAVE_MINUTES: 1.0e-9
AMP_ENABLE: False
DEVICE: cpu
"""


class Place:
    """A folder with a data set, a config and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_digits(folder / "digits")
        copy_photos(folder / "digits", folder / "photos", train=4, val=2)
        (folder / "micro.yaml").write_text(CONFIG)

    def start(self, name: str, rank: int, processes: int, port: int, prepare: Callable[[], None] | None = None) -> int:
        """Fork a process that trains in the run ``name``; returns its number."""
        if pid := os.fork():
            return pid
        status = 1
        try:
            log = os.open(self.folder / f"{name}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            if prepare:
                prepare()
            options = ["--cfg", "micro.yaml", "--data-path", "photos", "--output", "runs", "--tag", name]
            os.chdir(self.folder)
            status = train(options)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def weights(self, name: str) -> dict[str, Any]:
        content = read_checkpoint(self.folder / "runs/micro" / name / LATEST)
        return {key: content[key] for key in ("model", "model_ema", "optimizer", "epoch", "steps", "max_accuracy")}

    def log(self, name: str) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{name}.*.log")))


def wait_for(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill_at_random(place: Place, processes: int, kills: int, rng: random.Random) -> str:
    """Kill runs, by SIGKILL or SIGTERM, until there have been ``kills``; each run continues until it is finished."""
    start = time.perf_counter()
    reference = f"reference{processes}"
    port = get_free_port()
    assert wait_for([place.start(reference, rank, processes, port) for rank in range(processes)]) == [0] * processes
    length, expected = time.perf_counter() - start, place.weights(reference)
    done, runs, finished = 0, 0, 0
    while done < kills:
        name = f"killed{processes}-{runs}"
        runs += 1
        while True:
            port = get_free_port()
            pids = [place.start(name, rank, processes, port) for rank in range(processes)]
            time.sleep(rng.uniform(0.0, length))
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            for pid in pids:
                os.kill(pid, number)
            statuses = wait_for(pids)
            if statuses == [0] * processes:
                break
            if not set(statuses) <= {0, 75, -signal.SIGKILL, -signal.SIGTERM}:
                raise AssertionError(f"{name}: {statuses}\n{place.log(name)}")
            done += 1
            length = min(1.1 * length, 60.0)  # so that the run ends some time
        finished += 1
        assert_same(place.weights(name), expected, f"{name}, compared with the undisturbed run")
        shutil.rmtree(place.folder / "runs/micro" / name)
        length = max(length / 1.5, 0.5)
    return f"{done} kills of {finished} runs of {processes} process(es): all resumed to the same bits"


def fail_writes(first: int, number: int) -> None:
    """Let the write of index ``first`` in this process, from 1, and all after it fail with an error number."""
    calls = itertools.count(1)

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= first:
                raise OSError(number, os.strerror(number))
            return function(*args, **kwargs)

        return write

    for owner, name in (
        (torch, "save"), (os, "fsync"), (Path, "replace"), (Path, "write_text"), (Path, "mkdir"),
        (run_log.json, "dumps"), (SummaryWriter, "add_scalar"), (SummaryWriter, "flush"),
        (logging.StreamHandler, "flush"),
    ):  # fmt: skip
        setattr(owner, name, failing(getattr(owner, name)))


def fail_writes_in_turn(place: Place, every: int) -> str:
    """Let every n-th write of a run fail, and all after it, with ENOSPC or EIO; then repeat the command."""
    expected, failed = place.weights("reference1"), 0
    for index in range(1, 10_000, every):
        name, number = f"full{index}", (errno.ENOSPC, errno.EIO)[index % 2]

        prepare = functools.partial(fail_writes, index, number)
        (status,) = wait_for([place.start(name, 0, 1, get_free_port(), prepare)])
        errors = [line for line in place.log(name).splitlines() if line.startswith("error:")]
        if status == 0 and not errors and "cannot be written" not in place.log(name):
            return (
                f"up to {index} writes failed in turn: {failed} runs ended with one error, all resumed to the same bits"
            )
        if status == 0:  # only records were lost
            assert not errors
        elif status != 2 or len(errors) != 1 or os.strerror(number) not in errors[0]:
            raise AssertionError(f"write {index}: status {status}\n{place.log(name)}")
        failed += status == 2
        if wait_for([place.start(name, 0, 1, get_free_port())]) != [0]:
            raise AssertionError(f"write {index}: the run does not resume\n{place.log(name)}")
        assert_same(place.weights(name), expected, f"write {index}, compared with the undisturbed run")
        shutil.rmtree(place.folder / "runs/micro" / name, ignore_errors=True)
    raise AssertionError("there is no end of writes")


def damage_checkpoints(place: Place, count: int, rng: random.Random) -> str:
    """Flip bits, cut, or overwrite parts of a checkpoint: it is refused, or read with the same values."""
    path = place.folder / "damaged.pth"
    content = (place.folder / "runs/micro/reference1" / LATEST).read_bytes()
    path.write_bytes(content)
    expected, refused = read_checkpoint(path), 0
    for _ in range(count):
        damaged, place_of = bytearray(content), rng.randrange(len(content))
        kind = rng.choice(("flip", "cut", "zeros", "swap"))
        if kind == "flip":
            damaged[place_of] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del damaged[place_of:]
        elif kind == "zeros":
            damaged[place_of : place_of + 512] = bytes(min(512, len(content) - place_of))
        else:
            damaged[place_of : place_of + 64] = content[: min(64, len(content) - place_of)]
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except WeightsError:
            refused += 1
        else:
            assert_same(read, expected, f"{kind} at {place_of}")
    return f"{count} damaged checkpoints: {refused} refused, the others (damaged in padding) read with the same values"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all, with 1 and 2 processes (default: %(default)s)")
    parser.add_argument("--damages", type=int, default=350, help="damaged checkpoints (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="fail each N-th write (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for processes in (1, 2):
            print(kill_at_random(place, processes, args.kills // 2, rng), flush=True)
        print(fail_writes_in_turn(place, args.every), flush=True)
        print(damage_checkpoints(place, args.damages, rng), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
