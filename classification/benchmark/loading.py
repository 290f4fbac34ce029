"""Data loading with the trainer's own pipeline: images per second of every step, and by number of loader processes.

Without --data-path it reads JPEG images of ImageNet's usual size, which it makes in a temporary folder.
"""

import argparse
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
import PIL
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import default_collate
from yacs.config import CfgNode

from ...kernels.benchmark import measure
from ...kernels.benchmark.report import Column, Parser, Report
from ...kernels.command_line import positive, whole_number
from ...kernels.errors import UserError
from ..config import load_config
from ..data import build_mixup, build_train_loader, build_val_loader
from ..distributed import Process
from ..models.image_files import open_image

PHOTO_SIZE, PHOTO_QUALITY = (500, 375), 96  # width and height; of ImageNet's usual photograph, of about 110 kB
MANY = 100_000  # images dealt out per pass; a small data set starts over
TRAINING = ("train", "train + Mixup")
PIPELINES = ("decode", *TRAINING, "evaluation")


def write_photos(folder: Path, count: int) -> None:
    """Write ``train`` and ``val`` with the same ``count`` JPEG images in two classes, each another crop."""
    generator = np.random.default_rng(0)
    sources = _sources(generator)
    for i in range(count):
        source = sources[i % len(sources)]
        scale = generator.uniform(0.5, 1.0)
        width, height = (int(scale * side) for side in source.size)
        left, top = (int(generator.integers(free + 1)) for free in (source.width - width, source.height - height))
        photo = source.crop((left, top, left + width, top + height)).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        path = folder / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, quality=PHOTO_QUALITY)
    (folder / "val").symlink_to("train", target_is_directory=True)


def step_rates(config: CfgNode, device: torch.device, seconds: float) -> dict[str, float]:
    """Images per second of each step alone, in this process; Mixup runs on ``device``, as in training.

    Args:
        config: the trainer's.
        seconds: of timing per step.
    """
    process = Process(0, 1, device)
    train, val = build_train_loader(config, process).dataset, build_val_loader(config, process).dataset
    batch_size, reader = config.DATA.BATCH_SIZE, train.reader
    batch = [train[i % len(train), i] for i in range(batch_size)]
    images, classes, _ = (x.to(device) for x in default_collate(batch))
    mixup = build_mixup(config, len(reader.classes))
    count = itertools.count()

    def some() -> int:
        return next(count) % len(train)

    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (lambda: reader.read(some()), 1),
        "read + decode": (lambda: open_image(io.BytesIO(reader.read(some()))), 1),
        "read + decode + augment": (lambda: train[some(), next(count)], 1),
        "read + decode + evaluation transform": (lambda: val[some(), 0], 1),
        "collate": (lambda: default_collate(batch), batch_size),
    }
    if mixup:
        calls["Mixup"] = (lambda: mixup(images, classes), batch_size)
    threads = torch.get_num_threads()
    rates = {}
    for name, (call, images_per_call) in calls.items():
        torch.set_num_threads(threads if name == "Mixup" else 1)  # as in a loader process
        rates[name] = _rate(lambda call=call, many=images_per_call: (call(), many)[1], device, seconds, warm_up=1)
    torch.set_num_threads(threads)
    return rates


def loader_rate(config: CfgNode, pipeline: str, device: torch.device, seconds: float) -> float:
    """Images per second that arrive, on the device, from the loader with the config's number of processes.

    The first batches, on which the processes start, are not timed.

    Args:
        pipeline: one of ``PIPELINES``; ``decode`` hands over nothing of the image.
    """
    process = Process(0, 1, device)
    if pipeline == "evaluation":
        loader = build_val_loader(config, process)
        loader.sampler.indices = range(MANY)
    else:
        loader = build_train_loader(config, process)
        loader.sampler.length = MANY
    if pipeline == "decode":
        loader.dataset.transform = _nothing_of
    mixup = build_mixup(config, len(loader.dataset.reader.classes)) if pipeline == "train + Mixup" else None
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def take() -> int:
        images, classes, _ = (x.to(device, non_blocking=True) for x in next(batches))
        if mixup:
            mixup(images, classes)
        return len(classes)

    return _rate(take, device, seconds, warm_up=2 * loader.num_workers)


def _rate(take: Callable[[], int], device: torch.device, seconds: float, warm_up: int) -> float:
    """Images per second, of calls that return how many they have processed."""
    for _ in range(warm_up):
        take()
    measure.synchronise(device)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        count += take()
        measure.synchronise(device)
    return count / (time.perf_counter() - start)


def _nothing_of(image: Image.Image) -> Tensor:
    return torch.empty(0)


def _sources(generator: np.random.Generator) -> list[Image.Image]:
    """Scikit-learn's sample photographs, or without scikit-learn smooth noise."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        noise = Image.fromarray(generator.integers(256, size=(60, 80, 3), dtype=np.uint8))
        return [noise.resize((640, 480), Image.Resampling.BICUBIC)]
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def _parser() -> Parser:
    parser = Parser("classification.benchmark.loading", __doc__, 5.0, "figure")
    parser.set_defaults(keep_freed_memory=False)  # the trainer does not keep it either
    add = parser.add_argument
    add("--cfg", default="spatialmamba_tiny", metavar="FILE", help="the trainer's config")
    add("--data-path", metavar="FOLDER", help="with the train and val splits, as for training")
    add("--zip", action="store_true", help="read train.zip and val.zip")
    add("--batch-size", type=whole_number, help="by default the config's")
    add("--workers", nargs="+", type=whole_number, help="loader processes: by default 1, 2, 4, ...")
    add("--images-per-second", type=positive, metavar="SPEED", help="of the training to keep up with")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for options or data that cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.zip and not args.data_path:
        parser.error("--zip needs the folder of the archives: add --data-path FOLDER")
    try:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [("DATA.DATA_PATH", args.data_path or folder), ("DATA.ZIP_MODE", args.zip)]
            if args.batch_size:
                overrides.append(("DATA.BATCH_SIZE", args.batch_size))
            config, _ = load_config(args.cfg, [*overrides, ("DATA.NUM_WORKERS", 0)])
            if not args.data_path:
                write_photos(Path(folder), max(2, config.DATA.BATCH_SIZE))  # an epoch has at least one whole batch
            photos = build_train_loader(config, Process(0, 1, parser.device(args.device))).dataset.reader
            report = Report("loading", parser, args, argv)
            _run(report, args, config, photos)
    except UserError as error:  # from a loader process it comes with that one's traceback in front
        parser.error(str(error).strip().splitlines()[-1].split("UserError: ")[-1])
    return report.finish()


def _run(report: Report, args: argparse.Namespace, config: CfgNode, photos: Any) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = [len(photos.read(i)) for i in range(min(len(photos), 256))]
    report.record["data"] = facts = {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.check_feature("libjpeg_turbo"),
        "images": len(photos),
        "kilobytes_per_image": round(sum(sizes) / len(sizes) / 1e3, 1),
    }
    report.say("; ".join(f"{name} {value}" for name, value in facts.items()))
    rates = step_rates(config, device, args.seconds)
    rows = [{"name": name, "images_per_second": rate, "seconds": 1 / rate} for name, rate in rates.items()]
    columns = (
        Column("step", "name"),
        Column("images/s", "images_per_second", ".0f"),
        Column("ms per image", "seconds", ".3f", 1e3),
    )
    report.add("One process, each step alone", columns, rows, of="steps")
    cores = os.cpu_count() or 1
    counts = args.workers or sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    rows = []
    for count in sorted(set(counts)):
        config.defrost()
        config.DATA.NUM_WORKERS = count
        rows.append({"workers": count} | {name: loader_rate(config, name, device, args.seconds) for name in PIPELINES})
    columns = (Column("processes", "workers", "d"), *(Column(name, name, ".0f") for name in PIPELINES))
    report.add("Images per second, by number of loader processes", columns, rows, of="loaders")
    if (target := args.images_per_second) is not None:
        for name in TRAINING:
            enough = next((row["workers"] for row in rows if row[name] >= target), None)
            who = "no number measured keeps" if enough is None else f"{enough} loader processes keep"
            report.say(f"{name}: {who} up with {target:.0f} images/s")


if __name__ == "__main__":
    sys.exit(main())
