"""Fuzz every loader of files from outside: ``python -m spatial_mamba.tests.fuzz`` (``make fuzz``).

A loader must return, or raise a ``UserError``, within two seconds and in bounded memory. It must start no program,
write only in the folder of its input, and change no attribute of a module or class. Inputs run in forked processes, so
a crash names its input. Inputs that fail are kept in ``output/fuzz``, each with the traceback. Needs Linux.
"""

import argparse
import builtins
import faulthandler
import fnmatch
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.checkpoint import TrainingState, progress_of, restore_checkpoint, save_checkpoint
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import ImageData
from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.models import checkpoint_reader, stand_ins, unpickler, weights
from spatial_mamba.classification.models.image_files import read_image
from spatial_mamba.classification.models.trained import load_classifier
from spatial_mamba.classification.optim import build_optimizer, build_scheduler
from spatial_mamba.classification.readers import open_split
from spatial_mamba.classification.run_log import _drop_epochs
from spatial_mamba.classification.visualize.run_records import read_run
from spatial_mamba.kernels.command_line import printable
from spatial_mamba.kernels.errors import UserError

from . import fuzz_inputs as inputs
from .fuzz_inputs import Change, Files, change_bytes, change_file, change_text, either

if inputs.HistoryBuffer:
    from mmengine.runner import CheckpointLoader

    from spatial_mamba.detection.openmmlab.checkpoints import StrictLoadHook

FAILURES = Path(__file__).parents[1] / "output" / "fuzz"
IN_MEMORY = Path("/dev/shm")  # where Linux writes small files much faster
SECONDS = 2.0  # for one input
BATCH = 500  # inputs per process
MOST_FAILURES = 50  # of a target, whose other inputs are then skipped


@dataclass(frozen=True)
class Target:
    """A loader.

    Attributes:
        seeds: makes inputs that the loader accepts.
        change: makes another input of one of them.
        run: calls the loader; takes the folder of the input.
        weight: fraction of all inputs, in percent.
        pack: turns an input into files.
        memory: bytes that one input may take; decoded images are large.
    """

    seeds: Callable[[], list[Any]]
    change: Change
    run: Callable[[Path], Any]
    weight: int
    pack: Callable[[Any], Files] = lambda files: files
    memory: int = 2**29


# --- Loaders


def run_checkpoint(folder: Path) -> None:
    (path,) = folder.iterdir()
    checkpoint = weights.read_checkpoint(path)
    use(checkpoint)
    weights.state_dict_of(checkpoint, path)


def use(value: Any) -> None:
    """Touch the memory of all tensors and arrays."""
    if isinstance(value, torch.Tensor):
        assert value.layout == torch.strided and value.device.type == "cpu" and not value.requires_grad
        assert value.dtype != torch.bool or not value.numel() or value.reshape(-1).view(torch.uint8).max() <= 1
        value.clone()
    elif isinstance(value, np.ndarray):
        value.sum()
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            use(entry)


CONFIG, _ = load_config("spatialmamba_digits")
PROCESS = Process(0, 1, torch.device("cpu"))


def tiny_state() -> TrainingState:
    model = SpatialMamba(dims=4, depths=(1,), num_classes=2, fusion_dilations=(1,))
    optimizer = build_optimizer(CONFIG, model, PROCESS.world_size)
    schedule = build_scheduler(CONFIG, optimizer, 4, PROCESS.world_size)
    return TrainingState(model, ModelEmaV3(model), optimizer, schedule, torch.amp.GradScaler("cpu"), ["a", "b"])


def update(state: TrainingState) -> None:
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()


def training_checkpoints() -> list[Any]:
    """The content of a checkpoint between epochs, and of one within an epoch."""
    state, contents = tiny_state(), []
    update(state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latest.pth"
        for updates in range(2):
            state.totals.updates, state.totals.images = updates, updates * CONFIG.DATA.BATCH_SIZE
            save_checkpoint(state, CONFIG, path, progress_of(state, PROCESS))
            contents.append(weights.read_checkpoint(path))
    return contents


def classifier_checkpoints() -> list[Any]:
    return [{key: training_checkpoints()[0][key] for key in ("model", "model_ema", "classes", "config")}]


def run_restore(folder: Path) -> None:
    """Restore a run and make an update, which may fail later than loading."""
    path, state = folder / "x.pth", tiny_state()
    restore_checkpoint(state, CONFIG, weights.read_checkpoint(path), path, 4, PROCESS)
    update(state)


def run_classifier(folder: Path) -> None:
    for ema in (False, True):
        load_classifier(folder / "x.pth", ema)


def run_mmengine(folder: Path) -> None:
    path = str(folder / "x.pth")
    checkpoint = CheckpointLoader.load_checkpoint(path, logger="silent")
    runner = SimpleNamespace(model=torch.nn.BatchNorm2d(2), _load_from=path, work_dir=path)
    StrictLoadHook().after_load_checkpoint(runner, checkpoint)
    runner.model.load_state_dict(checkpoint.get("state_dict", checkpoint))


def run_image(folder: Path) -> None:
    (path,) = folder.iterdir()
    read_image(path)


def run_data_set(folder: Path) -> None:
    """Open a data set and read each image, which may be unreadable."""
    data = ImageData(open_split(str(folder), "train"), np.asarray)
    for index in range(len(data)):
        refuses(data.__getitem__, (index, 0))


def run_record(folder: Path) -> None:
    try:
        read_run(folder, "run")
    finally:
        _drop_epochs(folder / "metrics.jsonl", 2)


CHANGE_SAFETENSORS = either((3, inputs.change_safetensors), (1, change_bytes))
CHANGE_ZIP = either(
    (1, change_bytes), (2, inputs.change_zip_headers), (2, inputs.change_members(inputs.change_picture))
)
CHANGE_TAR = either((1, change_bytes), (4, inputs.change_tar))
CONTENT, IMAGES = dict(change=inputs.change_content, pack=inputs.pack_content), dict(memory=2**31)

TARGETS = {
    "checkpoint": Target(inputs.checkpoints, change_file(".pth", inputs.change_checkpoint), run_checkpoint, 34),
    "safetensors": Target(inputs.safetensors_files, change_file("s", CHANGE_SAFETENSORS), run_checkpoint, 10),
    "classifier": Target(classifier_checkpoints, run=run_classifier, weight=1, **CONTENT),
    "restore": Target(training_checkpoints, run=run_restore, weight=1, **CONTENT),
    "image": Target(
        lambda: [{name: content} for name, content in inputs.pictures().items()],
        inputs.change_image, run_image, 13, **IMAGES,
    ),
    "folder": Target(inputs.folders, inputs.change_folder, run_data_set, 4, **IMAGES),
    "zip": Target(
        lambda: [{"train.zip": inputs.zipped(inputs.classes())}],
        change_file(".zip", CHANGE_ZIP), run_data_set, 8, **IMAGES,
    ),
    "tar": Target(inputs.tars, change_file(".tar", CHANGE_TAR), run_data_set, 8, **IMAGES),
    "map": Target(
        inputs.maps, change_file(".txt", change_text(b"a/1.png", b"999999")), run_data_set, 6, **IMAGES
    ),
    "config": Target(
        inputs.configs, change_file(".yaml", change_text(*inputs.KEYS)), lambda f: load_config(f / "x.yaml"), 4
    ),
    "record": Target(
        inputs.records, change_file(".jsonl", change_text(b'"epoch"', b"[" * 100_000)), run_record, 8
    ),
}  # fmt: skip
if inputs.HistoryBuffer:
    TARGETS["mmengine"] = Target(inputs.mmengine_checkpoints, run=run_mmengine, weight=3, **CONTENT)


# --- What a loader must not do

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = {"subprocess.Popen", "socket.connect", "pickle.find_class"} | {
    f"os.{name}" for name in ("system", "exec", "posix_spawn", "fork", "forkpty")
}
CHANGES = {f"os.{name}" for name in ("remove", "rename", "mkdir", "rmdir", "chmod", "link", "symlink", "truncate")}


class Canary:
    """Finds programs that start, files that change elsewhere, and attributes and variables that change.

    Args:
        folder: where files may change.
        outside: the current folder, which stays empty.
    """

    def __init__(self, folder: Path, outside: Path) -> None:
        self.folder, self.outside, self.events, self.is_active = str(folder), outside, [], False
        owners = [builtins, os, torch, torch._utils, torch.serialization, torch.Tensor, np, np.ndarray, OrderedDict]
        for module in (stand_ins, checkpoint_reader, unpickler, weights):
            owners += [module, *(value for value in vars(module).values() if isinstance(value, type))]
        self.attributes = [(owner, dict(vars(owner))) for owner in owners]
        self.surroundings = self.look_around()
        sys.addaudithook(self.notice)

    def look_around(self) -> tuple[Any, ...]:
        return dict(os.environ), list(self.outside.iterdir()), Path.cwd(), len(torch.serialization.get_safe_globals())

    def notice(self, event: str, args: tuple) -> None:
        """Python calls this for every event of PEP 578."""
        writes = event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)
        if self.is_active and (event in STARTS or (writes and not str(args[0]).startswith(self.folder))):
            self.events.append((event, *map(str, args)))

    def check(self) -> None:
        """Raise an AssertionError if anything has happened or changed."""
        assert not self.events, self.events
        now = self.look_around()
        assert now == self.surroundings, f"{self.surroundings} became {now}"
        for owner, before in self.attributes:
            changed = [name for name in {**before, **vars(owner)} if vars(owner).get(name) is not before.get(name)]
            assert not changed, f"{owner}: {changed}"


class Formatter(logging.Handler):
    """Formats each record, which must not fail."""

    def emit(self, record: logging.LogRecord) -> None:
        printable(self.format(record)).encode()


def refuses(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether a function raises a UserError; any other error is raised, also a lack of memory that caused this one."""
    try:
        function(argument)
    except UserError as error:
        assert printable(str(error)).encode()
        cause: BaseException | None = error
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                raise MemoryError(f"{cause}") from error
        return True
    return False


# --- Batches


def write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def input_of(target: Target, seeds: Sequence[Any], key: str) -> Files:
    """The files of an input, which follow from its key."""
    rng = random.Random(key)
    return target.pack(target.change(rng.choice(seeds), rng))


def run_batch(target: Target, batch: Iterator[Files], place: Path, log: int, results: int) -> None:
    """In a forked process: run inputs, and write a line for each, until one fails."""
    folder, outside = place / "input", place / "outside"
    os.chdir(outside)
    os.environ |= {"HOME": str(outside), "TMPDIR": str(outside)}
    tempfile.tempdir = str(outside)
    os.dup2(log, 2)  # for libraries in C, such as libtiff
    faulthandler.enable(log)
    # Not dump_traceback_later, which waits forever after a fork in a process that uses it, such as pytest.
    faulthandler.register(signal.SIGALRM, log, chain=True)
    torch.set_num_threads(1)
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + target.memory,) * 2)
    canary = Canary(folder, outside)
    for files in batch:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(files, folder)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        start, canary.is_active = time.perf_counter(), True
        outcome = "refused" if refuses(target.run, folder) else "accepted"
        seconds, canary.is_active = time.perf_counter() - start, False
        signal.setitimer(signal.ITIMER_REAL, 0)
        canary.check()
        os.write(results, f"{outcome} {seconds}\n".encode())


def fork_batch(target: Target, batch: Iterator[Files], place: Path) -> tuple[list[list[str]], str]:
    """Run a batch in another process; returns its lines, and why it ended early if it did."""
    read_end, write_end = os.pipe()
    with (place / "log").open("w+b") as log:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                run_batch(target, batch, place, log.fileno(), write_end)
                status = 0
            except BaseException:
                os.write(log.fileno(), traceback.format_exc().encode(errors="backslashreplace"))
            finally:
                os._exit(status)
        os.close(write_end)
        with os.fdopen(read_end) as results:
            lines = [line.split() for line in results]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.seek(0)
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return lines, f"{name}\n{log.read().decode(errors='replace')}" if status else ""


def fuzz(name: str, count: int, seed: int) -> int:
    """Run a target and print one line.

    Returns:
        The number of inputs that failed.
    """
    logger = logging.getLogger("spatial_mamba")
    logger.handlers, logger.propagate = [Formatter()], False
    target, counts, slowest, failures, done = TARGETS[name], Counter(), 0.0, 0, 0
    torch.manual_seed(0)
    seeds = target.seeds()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        place = Path(folder).resolve()
        (place / "outside").mkdir()
        for number, content in enumerate(seeds):  # this also imports what loaders need
            write(target.pack(content), place / f"seed{number}")
            assert not refuses(target.run, place / f"seed{number}")
        while done < count and failures < MOST_FAILURES:
            keys = [f"{name}-{seed}-{number}" for number in range(done, min(done + BATCH, count))]
            lines, failure = fork_batch(target, (input_of(target, seeds, key) for key in keys), place)
            counts.update(outcome for outcome, _ in lines)
            slowest = max([slowest, *(float(seconds) for _, seconds in lines)])
            done += len(lines)
            if failure:
                key = keys[len(lines)]
                shutil.rmtree(FAILURES / key, ignore_errors=True)
                write({**input_of(target, seeds, key), "traceback.txt": failure.encode()}, FAILURES / key)
                failures, done = failures + 1, done + 1
    print(
        f"{name:<12}{done:>8,} inputs: {counts['accepted']:>7,} accepted, {counts['refused']:>7,} refused, "
        f"slowest {slowest:.2f} s, {failures} failures", flush=True,
    )  # fmt: skip
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000, help="inputs of all targets (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--target", default="*", metavar="GLOB", help=f"of {', '.join(TARGETS)} (default: all)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    chosen = fnmatch.filter(TARGETS, args.target)
    total = sum(TARGETS[name].weight for name in chosen)
    failures = [fuzz(name, args.count * TARGETS[name].weight // total, args.seed) for name in chosen]
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
