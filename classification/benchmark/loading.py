"""Time data loading with the trainer's own pipeline: each step alone, and the loader with several process counts.

Without --data-path it reads generated JPEG images of ImageNet's average size from a temporary folder. Prints a table,
and writes loading.json.
"""

import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm
from yacs.config import CfgNode

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import Column, Parser, Report
from ...kernels.command_line import run_command, whole_number
from ...kernels.errors import UserError
from ..config import load_config
from ..data import build_mixup, build_train_loader, build_val_loader
from ..distributed import Process
from ..models.image_files import open_image

# About 110 kB each, like the average photograph of ImageNet; sizes are (width, height).
PHOTO_SIZE, NOISE_SIZE, PHOTO_QUALITY = (500, 375), (160, 120), 90
MANY = 100_000  # images per pass; smaller data sets are repeated
PIPELINES = ("decode", "train", "train + Mixup", "evaluation")
COLUMNS = (
    Column("", "name"),
    Column("loader processes", "workers", "d"),
    Column("images/s", "images_per_second", ".0f"),
)


def write_photos(folder: Path, count: int) -> None:
    """Write ``count`` JPEG images of smooth noise, in two classes, as both the ``train`` and the ``val`` split."""
    generator = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(generator.integers(256, size=(*NOISE_SIZE[::-1], 3), dtype=np.uint8))
        path = folder / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(path, quality=PHOTO_QUALITY)
    (folder / "val").symlink_to("train", target_is_directory=True)


def step_rates(config: CfgNode, device: torch.device, seconds: float) -> dict[str, float]:
    """Images per second of each step alone, in this process; Mixup runs on ``device``, as in training.

    Args:
        config: the trainer's config.
        seconds: how long to time each step.
    """
    process = Process(0, 1, device)
    train: Any = build_train_loader(config, process).dataset
    val: Any = build_val_loader(config, process).dataset
    batch_size, reader = config.DATA.BATCH_SIZE, train.reader
    batch = [train[i % len(train), i] for i in range(batch_size)]
    images, classes, _ = (x.to(device) for x in default_collate(batch))
    mixup = build_mixup(config, len(reader.classes))
    numbers = itertools.count()

    def some() -> int:
        return next(numbers) % len(train)

    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (lambda: reader.read(some()), 1),
        "read + decode": (lambda: open_image(io.BytesIO(reader.read(some()))), 1),
        "read + decode + augment": (lambda: train[some(), next(numbers)], 1),
        "read + decode + evaluation transform": (lambda: val[some(), 0], 1),
        "collate": (lambda: default_collate(batch), batch_size),
    }
    if mixup:
        calls["Mixup"] = (lambda: mixup(images, classes), batch_size)
    threads, rates = torch.get_num_threads(), {}
    for name, (call, images_per_call) in calls.items():
        torch.set_num_threads(threads if name == "Mixup" else 1)  # as in a loader process
        rates[name] = images_per_call * _rate(call, device, seconds, warm_up=1)
    torch.set_num_threads(threads)
    return rates


def loader_rate(config: CfgNode, pipeline: str, device: torch.device, seconds: float) -> float:
    """Images per second that arrive on the device from the loader, with the config's number of processes.

    The first batches, during which the processes start, are not timed.

    Args:
        pipeline: one of ``PIPELINES``; ``decode`` discards the decoded image.
    """
    process = Process(0, 1, device)
    if pipeline == "evaluation":
        loader: Any = build_val_loader(config, process)
        loader.sampler.indices = range(MANY)
    else:
        loader = build_train_loader(config, process)
        loader.sampler.length = MANY
    if pipeline == "decode":
        loader.dataset.transform = _empty
    mixup = build_mixup(config, len(loader.dataset.reader.classes)) if pipeline == "train + Mixup" else None
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def take() -> None:
        images, classes, _ = (x.to(device, non_blocking=True) for x in next(batches))
        if mixup:
            mixup(images, classes)

    return config.DATA.BATCH_SIZE * _rate(take, device, seconds, warm_up=2 * loader.num_workers)


def _rate(call: Callable[[], Any], device: torch.device, seconds: float, warm_up: int) -> float:
    """Calls per second."""
    for _ in range(warm_up):
        call()
    measure.synchronise(device)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        call()
        measure.synchronise(device)
        count += 1
    return count / (time.perf_counter() - start)


def _empty(image: Image.Image) -> Tensor:
    return torch.empty(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for options or data that cannot be used."""
    return run_command(_benchmark, argv)


def _parser() -> Parser:
    example = "--data-path imagenet --workers 4 8 16"
    parser = Parser("spatial-mamba benchmark loading", __doc__, example, seconds=5.0, of="row")
    add = parser.add_argument
    add("--cfg", default="spatialmamba_tiny", metavar="FILE", help="config of the trainer (default: %(default)s)")
    add("--data-path", metavar="FOLDER", help="with the train and val splits, as for training")
    add("--zip", action="store_true", help="read train.zip and val.zip")
    add("--batch-size", type=whole_number, help="default: the config's")
    add("--workers", nargs="+", type=whole_number, help="loader processes (default: 1, 2, 4, ... up to the cores)")
    return parser


def _benchmark(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.zip and not args.data_path:
        raise UserError("--zip needs the folder of the archives: add --data-path FOLDER")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [("DATA.DATA_PATH", args.data_path or folder), ("DATA.ZIP_MODE", args.zip)]
        overrides += [("DATA.BATCH_SIZE", args.batch_size)] if args.batch_size else []
        config, _ = load_config(args.cfg, [*overrides, ("DATA.NUM_WORKERS", 0)])
        if not args.data_path:
            write_photos(Path(folder), max(2, config.DATA.BATCH_SIZE))  # at least one batch per epoch
        report = Report("loading", args, keep_freed=False)  # like the trainer
        cores = os.cpu_count() or 1
        workers = args.workers or [*(2**i for i in range(cores.bit_length())), cores]
        _measure(report, config, sorted(set(workers)), args.seconds)
    return report.finish()


def _measure(report: Report, config: CfgNode, workers: Sequence[int], seconds: float) -> None:
    """Add the table to the report."""
    rates = step_rates(config, report.device, seconds)
    rows = [{"name": name, "images_per_second": rate} for name, rate in rates.items()]
    for count, name in tqdm(list(itertools.product(workers, PIPELINES)), "loaders", disable=None):
        config.defrost()
        config.DATA.NUM_WORKERS = count
        rate = loader_rate(config, name, report.device, seconds)
        rows.append({"name": name, "workers": count, "images_per_second": rate})
    turbo = features.check_feature("libjpeg_turbo")
    title = f"Batches of {config.DATA.BATCH_SIZE} images; Pillow has {'' if turbo else 'no '}libjpeg-turbo"
    report.add(title, COLUMNS, rows, libjpeg_turbo=turbo)


if __name__ == "__main__":
    sys.exit(main())
