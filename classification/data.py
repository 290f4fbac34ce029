"""Data sets, transforms, samplers and loaders of the ImageNet recipe."""

import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from ..kernels.errors import UserError
from .config import images_per_update, uses_mixup
from .distributed import Process
from .models.image_files import open_image
from .models.preprocessing import NORMALISATION, preprocessing_of
from .preemption import ignore_signals
from .readers import CachedReader, Reader, open_split
from .seeding import random_seed


class ImageData(Dataset):
    """Transformed images of one split.

    Items are indexed by ``(index, seed)``. The augmentation of an image depends only on its seed, not on the number of
    workers, so a resumed run sees the same images as an uninterrupted one.

    Args:
        reader: where the images come from.
        transform: PIL image to tensor (3, H, W).
        skip_unreadable: replace a damaged image with the next readable one instead of stopping; None if the split does
            not allow this.
        turn: rotate images by their EXIF orientation.
        numbers: number of each class of the reader; by default the reader's own.
    """

    def __init__(
        self,
        reader: Reader,
        transform: Callable,
        skip_unreadable: bool | None = False,
        turn: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.skip_unreadable = skip_unreadable
        self.turn = turn
        self.numbers = range(len(reader.classes)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int]:
        """Image, class, and the number of damaged images skipped before it."""
        index, seed = item
        for skipped in range(len(self)):
            position = (index + skipped) % len(self)
            try:
                image = open_image(io.BytesIO(self.reader.read(position)), self.turn)
            except Exception as error:  # decoders raise many types
                if self.skip_unreadable:
                    continue
                reason = str(error).split(" <_io")[0]  # Pillow names the buffer it was given
                remedy = "" if self.skip_unreadable is None else ", or train with --skip-unreadable"
                raise UserError(
                    f"{self.reader.name(position)}: unreadable image ({reason}); replace or remove it{remedy}"
                ) from error
            with _seeded(seed):
                return self.transform(image), self.numbers[self.reader.label(position)], skipped
        raise UserError(f"{self.reader.name(0)} and all other images of the split are unreadable")


class ImageLoader(DataLoader):
    """Batches of an `ImageData`."""

    dataset: ImageData
    sampler: Any  # TrainSampler or EvalSampler

    def check_worker_number_rationality(self) -> None:
        """Override PyTorch's warning on machines with fewer cores than ``--workers``, whose default suits a server."""


class TrainSampler(Sampler):
    """Yields ``(index, seed)`` in a new order every epoch, the same number on every process.

    With ``sharded``, a process stays with the images it holds in memory: index modulo world size equals its rank.
    """

    def __init__(self, length: int, process: Process, seed: int, sharded: bool = False) -> None:
        self.length = length
        self.process = process
        self.seed = seed
        self.sharded = sharded
        self.epoch = 0
        self.start = 0  # images of the epoch that have been used, by all processes together

    def __len__(self) -> int:
        return self.length // self.process.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(random_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        seeds = torch.randint(2**31, (self.length,), generator=generator)
        rank, world_size = self.process.rank, self.process.world_size
        left = len(self) - self.start // world_size
        if self.sharded:
            own = order[order % world_size == rank][self.start // world_size :][:left]
        else:
            own = order[self.start :][rank::world_size][:left]
        return zip(own.tolist(), seeds[own].tolist(), strict=True)


class EvalSampler(Sampler):
    """Yields every image once over all processes; without padding, so their numbers may differ by one."""

    def __init__(self, length: int, process: Process) -> None:
        self.indices = range(process.rank, length, process.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, 0) for index in self.indices)


def build_transform(config: CfgNode, is_training: bool) -> Callable:
    """timm's transform of PIL images to normalised tensors (3, IMG_SIZE, IMG_SIZE).

    Raises:
        UserError: for an augmentation policy that timm does not know.
    """
    if not is_training:
        return preprocessing_of(config).transform()
    aug = config.AUG
    policy = "" if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT
    color_jitter: Any = aug.COLOR_JITTER or None  # None, which skips the step, is missing in timm's annotation
    try:
        transform = create_transform(
            input_size=config.DATA.IMG_SIZE,
            is_training=True,
            interpolation=config.DATA.INTERPOLATION,
            **NORMALISATION,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            color_jitter=color_jitter,
            auto_augment=policy,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    except (AssertionError, ValueError, LookupError) as error:
        reason = f" ({error})" if str(error) else ""
        raise UserError(
            f"AUG.AUTO_AUGMENT is {policy!r}, which timm does not accept{reason}; "
            "it must be none or a policy of timm, such as rand-m9"
        ) from error
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def build_train_loader(config: CfgNode, process: Process) -> ImageLoader:
    """Full batches ``(images (B, 3, S, S), classes (B,), skipped (B,))`` of the training split.

    Raises:
        UserError: if the split cannot be opened, or is smaller than one update of all processes.
    """
    dataset = _open_dataset(config, process, "train")
    per_update = images_per_update(config, process.world_size)
    if len(dataset) < per_update:
        raise UserError(
            f"{config.DATA.DATA_PATH}: {len(dataset)} training images are fewer than the {per_update} of one update "
            "(batch size x processes x accumulation steps); lower one of these"
        )
    sampler = TrainSampler(len(dataset), process, config.SEED, sharded=_caches_part(config))
    return _build_loader(config, process, dataset, sampler, drop_last=True)


def build_val_loader(config: CfgNode, process: Process, known: Sequence[str] | None = None) -> ImageLoader:
    """Batches of the validation split, the last one possibly smaller; each image once over all processes.

    Args:
        known: names of classes in the order of their numbers; by default the data set's.

    Raises:
        UserError: if the split cannot be opened, or has a class that is not in ``known``.
    """
    dataset = _open_dataset(config, process, "val", known)
    return _build_loader(config, process, dataset, EvalSampler(len(dataset), process), drop_last=False)


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix, if the recipe uses them; they also smooth the labels."""
    if not uses_mixup(config):
        return None
    aug = config.AUG
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def check_classes(config: CfgNode, classes: list[str], other: list[str]) -> int:
    """Number of classes of the data set; the config and the other split must agree with it.

    Raises:
        UserError: naming both numbers, a class that only one split has, or the only class.
    """
    path = config.DATA.DATA_PATH
    if classes != other:
        lone = sorted(set(classes) ^ set(other))
        reason = f"only one of them has {lone[0]}" if lone else "they number them in different orders"
        raise UserError(f"{path}: train and val must have the same classes; {reason}")
    if len(classes) == 1:
        raise UserError(
            f"{path}: train and val have one class folder, {classes[0]}; training needs two or more classes"
        )
    check_number(config, len(classes), f"{path}: the data set")
    return len(classes)


def check_number(config: CfgNode, number: int, owner: str) -> None:
    """Raise UserError if the config has a different number of classes from ``owner``."""
    if config.MODEL.NUM_CLASSES not in (0, number):
        raise UserError(
            f"{owner} has {number} classes, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; "
            f"add --opts MODEL.NUM_CLASSES {number} if that is intended"
        )


def difference(classes: Sequence[str], known: Sequence[str]) -> str:
    """How the classes of the data differ from those of a checkpoint, in words."""
    found = []
    for owner, names, others in (("data", classes, set(known)), ("checkpoint", known, set(classes))):
        lone = [name for name in names if name not in others]
        if lone:
            found.append(f"only the {owner} has {', '.join(lone[:3])}{', ...' if len(lone) > 3 else ''}")
    return " and ".join(found) or "they are in a different order"


def _open_dataset(config: CfgNode, process: Process, split: str, known: Sequence[str] | None = None) -> ImageData:
    is_training = split == "train"
    reader = open_split(config.DATA.DATA_PATH, split, config.DATA.ZIP_MODE)
    numbers = None
    if known is not None and reader.has_names:
        if not set(reader.classes) <= set(known):
            raise UserError(
                f"{config.DATA.DATA_PATH}: the classes are not those of the checkpoint: "
                f"{difference(reader.classes, known)}; evaluate it on its own classes, under the same names"
            )
        numbers = [known.index(name) for name in reader.classes]
    if config.DATA.CACHE_MODE == "full":
        reader = CachedReader(reader, range(len(reader)))
    elif _caches_part(config):
        reader = CachedReader(reader, range(process.rank, len(reader), process.world_size))
    skip_unreadable = config.DATA.SKIP_UNREADABLE if is_training else None
    transform = build_transform(config, is_training)
    return ImageData(reader, transform, skip_unreadable, config.DATA.EXIF_ORIENTATION, numbers)


def _caches_part(config: CfgNode) -> bool:
    """Whether each process trains on its own images, kept in memory; as published, only with --zip."""
    return config.DATA.CACHE_MODE == "part" and config.DATA.ZIP_MODE


def _build_loader(
    config: CfgNode, process: Process, dataset: ImageData, sampler: Sampler, drop_last: bool
) -> ImageLoader:
    workers = config.DATA.NUM_WORKERS
    return ImageLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        pin_memory=config.DATA.PIN_MEMORY and process.device.type == "cuda",
        drop_last=drop_last,
        persistent_workers=workers > 0,
        worker_init_fn=_start_loader_process if workers > 0 else None,
        generator=torch.Generator(),  # not the global one, which would be used only when the workers first start
    )


def _start_loader_process(worker: int) -> None:
    ignore_signals(worker)
    sys.excepthook = _ignore_lost_connections


def _ignore_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A loader process loses its connection when its parent fails, and the parent reports the reason itself."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    """timm's ``posterize``, also for no bits: a black image, which Pillow 13 and later refuse to make."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a block, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
