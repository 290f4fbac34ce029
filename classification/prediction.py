"""Classifies images, a line each: ``python -m spatial_mamba IMAGE ... --checkpoint FILE``."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from ..kernels.options import whole_number
from .command_line import Parser, chosen_device, run_command
from .errors import InputError
from .models.image_files import ImageFileError, find_images, read_image
from .models.trained import TrainedClassifier, load_classifier

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
        top_k: how many classes to tell.

    Yields:
        For each image a dictionary: ``image``, and ``classes``, from the most probable on, of ``name``, ``index`` and
        ``probability``; for a file that cannot be read, the ImageFileError that says so.
    """
    transform = classifier.preprocessing.transform()
    device = next(classifier.model.buffers()).device
    for first in range(0, len(images), BATCH_SIZE):
        paths = images[first : first + BATCH_SIZE]
        tensors = [_read(path, transform) for path in paths]
        readable = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        top = iter(())
        if readable:
            with torch.inference_mode():
                shares = classifier.model(torch.stack(readable).to(device)).softmax(dim=1)
            values, indices = shares.topk(min(top_k, len(names)))
            top = zip(values.tolist(), indices.tolist(), strict=True)
        for path, tensor in zip(paths, tensors, strict=True):
            if isinstance(tensor, ImageFileError):
                yield tensor
                continue
            classes = [
                {"name": names[index], "index": index, "probability": share}
                for share, index in zip(*next(top), strict=True)
            ]
            yield {"image": str(path), "classes": classes}


def _read(path: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor | ImageFileError:
    try:
        return transform(read_image(path))
    except ImageFileError as error:
        return error


def class_names(classifier: TrainedClassifier, file: Path | None = None) -> list[str]:
    """Names of the classes: of a file with a line each, else of the checkpoint, else of ImageNet, else numbers.

    Raises:
        InputError: for a file that cannot be read, or does not have one line per class.
    """
    count = classifier.model.num_classes
    if file is not None:
        try:
            names = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--classes {file}: cannot be read ({error})") from error
        if len(names) != count:
            raise InputError(f"--classes {file}: has {len(names)} lines, the model {count} classes; give a line each")
        return names
    imagenet = ImageNetInfo("imagenet-1k")
    synsets = imagenet.label_names()
    if classifier.class_names is None:
        known = count == imagenet.num_classes()
        return [imagenet.index_to_description(i) if known else f"class {i}" for i in range(count)]
    # The folders of ImageNet, and of subsets of it, are named by synsets.
    return [imagenet.label_name_to_description(n) if n in synsets else n for n in classifier.class_names]


def _command(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    device = chosen_device(args.device)
    images = find_images(args.images)
    classifier = load_classifier(args.checkpoint, ema=args.ema)
    if classifier.model.num_classes == 0 or classifier.model.in_chans != 3:
        found = f"{classifier.model.num_classes} classes and {classifier.model.in_chans} channels"
        raise InputError(f"{args.checkpoint}: a classifier of RGB images is needed, this has {found}")
    names = class_names(classifier, args.classes)
    classifier.model.to(device).fuse()
    unreadable = 0
    for result in classify(classifier, images, names, args.top_k):
        if isinstance(result, ImageFileError):
            unreadable += 1
            print(f"error: {result}", file=sys.stderr)
        else:
            print(json.dumps(result) if args.json else _line(result), flush=True)
    if unreadable:
        raise InputError(f"{unreadable} of {len(images)} images could not be read, see above")


def _line(result: dict[str, Any]) -> str:
    classes = "; ".join(f"{entry['name']} {entry['probability']:.1%}" for entry in result["classes"])
    return f"{result['image']}: {classes}"


def _parser() -> Parser:
    parser = Parser("python -m spatial_mamba", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder, or pattern such as '*.jpg'")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="weights; they tell the variant")
    parser.add_argument("--ema", action="store_true", help="take the EMA weights of the checkpoint")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, a line each")
    parser.add_argument("--top-k", type=whole_number, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object per image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser
