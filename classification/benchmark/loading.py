"""Data loading with the trainer's own pipeline: images per second of every step, and by number of loader processes.

Without --data-path it reads JPEG images of ImageNet's usual size, which it makes in a temporary folder.
"""

import argparse
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from yacs.config import CfgNode

from ...kernels.benchmark import options
from ..config import load_config
from ..data import build_mixup, build_train_loader, build_val_loader
from ..distributed import Process
from ..errors import InputError
from ..models.image_files import open_image
from .command import Parser, Report, Table

PHOTO_SIZE, PHOTO_QUALITY = (500, 375), 96  # width and height; of ImageNet's usual photograph, of about 110 kB
MANY = 100_000  # images dealt out per pass; a small data set starts over
TRAINING = ("train", "train + Mixup")
PIPELINES = ("decode", *TRAINING, "evaluation")


def write_photos(folder: Path, count: int) -> None:
    """Write ``train`` and ``val`` with the same ``count`` JPEG images in two classes.

    Each is another crop of scikit-learn's sample photographs, or without scikit-learn of smooth noise.
    """
    generator = np.random.default_rng(0)
    sources = _sample_photos() or [_smooth_noise(generator)]
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

    def mix() -> None:
        mixup(images, classes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls: dict[str, tuple[Callable[[int], Any], int]] = {
        "read": (lambda i: reader.read(i % len(train)), 1),
        "read + decode": (lambda i: open_image(io.BytesIO(reader.read(i % len(train)))), 1),
        "read + decode + augment": (lambda i: train[i % len(train), i], 1),
        "read + decode + evaluation transform": (lambda i: val[i % len(val), 0], 1),
        "collate": (lambda i: default_collate(batch), batch_size),
    }
    if mixup:
        calls["Mixup"] = (lambda i: mix(), batch_size)
    threads = torch.get_num_threads()
    rates = {}
    for name, (call, images_per_call) in calls.items():
        torch.set_num_threads(threads if name == "Mixup" else 1)  # as in a loader process
        rates[name] = images_per_call * _calls_per_second(call, seconds)
    torch.set_num_threads(threads)
    return rates


def loader_rate(config: CfgNode, pipeline: str, device: torch.device, seconds: float) -> float:
    """Images per second that arrive, on the device, from the loader with the config's number of processes.

    The first batches, on which the processes start, are not timed.

    Args:
        pipeline: one of ``PIPELINES``; ``decode`` hands over nothing of the image.
    """
    process = Process(0, 1, device)
    mixup: Mixup | None = None
    if pipeline == "evaluation":
        loader = build_val_loader(config, process)
        loader.sampler.indices = range(MANY)
    else:
        loader = build_train_loader(config, process)
        loader.sampler.length = MANY
    if pipeline == "decode":
        loader.dataset.transform = _nothing_of
    if pipeline == "train + Mixup":
        mixup = build_mixup(config, len(loader.dataset.reader.classes))
    return _arrivals_per_second(loader, mixup, device, seconds)


def processes_needed(rates: dict[int, float], target: float) -> tuple[int, bool]:
    """Loader processes that keep up with ``target`` images per second.

    Args:
        rates: images per second, by number of processes.

    Returns:
        The smallest number measured that does; or else, with ``False``, what would do if every further process
        brought what those of the best number measured bring on average.
    """
    enough = [count for count, rate in rates.items() if rate >= target]
    if enough:
        return min(enough), True
    best = max(rates, key=lambda count: rates[count])
    return math.ceil(target / (rates[best] / best)), False


def _arrivals_per_second(loader: DataLoader, mixup: Mixup | None, device: torch.device, seconds: float) -> float:
    batches = _endless(loader)

    def take() -> int:
        images, classes, _ = (x.to(device, non_blocking=True) for x in next(batches))
        if mixup:
            mixup(images, classes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(classes)

    for _ in range(2 * loader.num_workers):
        take()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        count += take()
    return count / (time.perf_counter() - start)


def _endless(loader: DataLoader) -> Iterator[Sequence[Tensor]]:
    while True:
        yield from loader


def _calls_per_second(call: Callable[[int], Any], seconds: float) -> float:
    call(0)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        call(count)
        count += 1
    return count / (time.perf_counter() - start)


def _nothing_of(image: Image.Image) -> Tensor:
    return torch.empty(0)


def _sample_photos() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return []
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def _smooth_noise(generator: np.random.Generator) -> Image.Image:
    noise = Image.fromarray(generator.integers(256, size=(60, 80, 3), dtype=np.uint8))
    return noise.resize((640, 480), Image.Resampling.BICUBIC)


def _steps_table(rates: dict[str, float]) -> Table:
    rows = [(name, f"{rate:.0f}", f"{1e3 / rate:.3f}") for name, rate in rates.items()]
    return Table("One process, each step alone", ("step", "images/s", "ms per image"), rows)


def _loaders_table(rates: dict[str, dict[int, float]]) -> Table:
    counts = list(next(iter(rates.values())))
    rows = [(str(count), *(f"{rates[name][count]:.0f}" for name in rates)) for count in counts]
    return Table("Images per second, by number of loader processes", ("processes", *rates), rows)


def _keeps_up(name: str, rates: dict[int, float], target: float) -> str:
    count, is_measured = processes_needed(rates, target)
    if is_measured:
        return f"{name}: {count} loader processes keep up with {target:.0f} images/s"
    cores = os.cpu_count() or 1
    remark = f", which takes more cores than the {cores} here" if count > cores else ""
    return (
        f"{name}: no number measured keeps up with {target:.0f} images/s; "
        f"about {count} loader processes would, with a core each{remark}"
    )


def _parser() -> Parser:
    parser = Parser("loading", __doc__)
    parser.add_argument("--cfg", default="spatialmamba_tiny", metavar="FILE", help="the trainer's config")
    parser.add_argument("--data-path", metavar="FOLDER", help="with the train and val splits, as for training")
    parser.add_argument("--zip", action="store_true", help="read train.zip and val.zip")
    parser.add_argument("--batch-size", type=options.whole_number, help="by default the config's")
    parser.add_argument(
        "--workers", nargs="+", type=options.whole_number, help="loader processes: by default 1, 2, 4, ..."
    )
    parser.add_argument(
        "--images-per-second", type=options.positive, metavar="SPEED", help="of the training to keep up with"
    )
    parser.add_argument("--seconds", type=options.seconds, default=5.0, help="of timing per figure")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for options or data that cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = parser.device(args.device)
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
            _run(parser, args, device, config)
    except InputError as error:  # from a loader process it comes with that one's traceback in front
        parser.error(str(error).strip().splitlines()[-1].split("InputError: ")[-1])
    return 0


def _run(parser: Parser, args: argparse.Namespace, device: torch.device, config: CfgNode) -> None:
    if args.threads:  # nothing else is prepared: the trainer does not keep freed memory either
        torch.set_num_threads(args.threads)
    photos = build_train_loader(config, Process(0, 1, device)).dataset.reader
    report = Report(parser, args, device)
    sizes = [len(photos.read(i)) for i in range(min(len(photos), 256))]
    facts = {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.check_feature("libjpeg_turbo"),
        "images": len(photos),
        "kilobytes_per_image": round(sum(sizes) / len(sizes) / 1e3, 1),
    }
    report.say("; ".join(f"{name} {value}" for name, value in facts.items()))
    report.record["data"] = facts

    rates = step_rates(config, device, args.seconds)
    report.record["steps"] = rates
    report.table(_steps_table(rates))
    cores = os.cpu_count() or 1
    counts = args.workers or sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    arrivals: dict[str, dict[int, float]] = {name: {} for name in PIPELINES}
    report.record["loaders"] = arrivals
    for count in sorted(set(counts)):
        config.defrost()
        config.DATA.NUM_WORKERS = count
        for name in PIPELINES:
            arrivals[name][count] = loader_rate(config, name, device, args.seconds)
        report.write()
    report.table(_loaders_table(arrivals))
    if args.images_per_second:
        for name in TRAINING:
            report.say(_keeps_up(name, arrivals[name], args.images_per_second))
    report.write()


if __name__ == "__main__":
    sys.exit(main())
