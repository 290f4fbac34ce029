"""Classify images; prints one line per image."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from tqdm import tqdm

from ..kernels.command_line import Parser, print_error, printable, run_command, whole_number
from ..kernels.errors import UserError
from .command_line import add_model_options, chosen_model
from .models.image_files import ImageFileError, find_images, read_image
from .models.trained import TrainedClassifier

BATCH_SIZE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def classify(
    classifier: TrainedClassifier, images: Sequence[Path], names: Sequence[str], top_k: int = 5
) -> Iterator[dict[str, Any] | ImageFileError]:
    """Classify image files, batch by batch.

    Args:
        classifier: on the device to compute on, fused or not.
        images: any number of files.
        names: one per class.
        top_k: number of classes to report.

    Yields:
        For each image a dictionary with ``image`` and ``classes``: dictionaries with ``name``, ``index`` and
        ``probability``, the most probable class first. For a file that cannot be read, an ImageFileError.
    """
    transform = classifier.preprocessing.transform()
    device = next(classifier.model.buffers()).device
    for first in range(0, len(images), BATCH_SIZE):
        paths = images[first : first + BATCH_SIZE]
        tensors = [_read(path, transform) for path in paths]
        readable = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        top: Iterator[tuple[list[float], list[int]]] = iter(())
        if readable:
            with torch.inference_mode():
                probabilities = classifier.model(torch.stack(readable).to(device)).softmax(dim=1)
            values, indices = probabilities.topk(min(top_k, len(names)))
            top = zip(values.tolist(), indices.tolist(), strict=True)
        for path, tensor in zip(paths, tensors, strict=True):
            if isinstance(tensor, ImageFileError):
                yield tensor
                continue
            classes = [
                {"name": names[index], "index": index, "probability": probability}
                for probability, index in zip(*next(top), strict=True)
            ]
            yield {"image": str(path), "classes": classes}


def _read(path: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor | ImageFileError:
    try:
        return transform(read_image(path))
    except ImageFileError as error:
        return error


def class_names(classifier: TrainedClassifier, file: Path | None = None) -> list[str]:
    """Names of the classes: from a file with one per line, else the checkpoint's, else ImageNet's, else numbers.

    Raises:
        UserError: for a file that cannot be read, or does not have one line per class.
    """
    count = classifier.model.num_classes
    if file is not None:
        try:
            names = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {file}: cannot be read ({error})") from error
        if len(names) != count:
            raise UserError(f"--classes {file}: has {len(names)} lines for the model's {count} classes; give one each")
        return names
    imagenet = ImageNetInfo("imagenet-1k")
    synsets = imagenet.label_names()
    if classifier.class_names is None:
        known = count == imagenet.num_classes()
        return [imagenet.index_to_description(i) if known else f"class {i}" for i in range(count)]
    # ImageNet and its subsets name class folders by synsets.
    return [imagenet.label_name_to_description(n) if n in synsets else n for n in classifier.class_names]


def _command(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    images = find_images(args.images)
    classifier = chosen_model(args)
    if classifier.model.num_classes == 0 or classifier.model.in_chans != 3:
        found = f"{classifier.model.num_classes} classes and {classifier.model.in_chans} channels"
        raise UserError(f"{args.checkpoint}: a classifier of RGB images is needed, this has {found}")
    names = class_names(classifier, args.classes)
    classifier.model.fuse()
    unreadable = 0
    results = classify(classifier, images, names, args.top_k)
    no_bar = sys.stdout.isatty() or None  # between results on a terminal; None leaves the choice to tqdm
    for result in tqdm(results, total=len(images), unit="image", disable=no_bar):
        if isinstance(result, ImageFileError):
            unreadable += 1
            print_error(result)
        else:
            print(json.dumps(result) if args.json else _line(result), flush=True)
    if unreadable:
        raise UserError(f"{unreadable} of {len(images)} images could not be read, see above")


def _line(result: dict[str, Any]) -> str:
    classes = "; ".join(f"{printable(entry['name'])} {entry['probability']:.1%}" for entry in result["classes"])
    return f"{printable(result['image'])}: {classes}"


def _parser() -> Parser:
    parser = Parser("spatial-mamba predict", __doc__, "photo.jpg photos/ --checkpoint spatialmamba_tiny.pth")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, folder (without its subfolders), or pattern such as 'photos/**/*.jpg'",
    )
    add_model_options(parser, untrained=False)
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    parser.add_argument("--top-k", type=whole_number, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    return parser
