"""The prediction command of both packages. It checks all inputs before the first prediction."""

import json
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from ...classification.command_line import chosen_device
from ...classification.models import image_files
from ...classification.models.weights import load_strictly, read_checkpoint, state_dict_of
from ...kernels.errors import UserError
from .commands import Parser
from .data_checks import other_counts
from .tools import load_config


class Predictor(ABC):
    """A model and its predictions for an image, with one subclass per package.

    Args:
        config: the model's config.
        device: of the model.
        args: the options of the command line.
    """

    package: ClassVar[str]  # mmdet or mmseg
    endings: ClassVar[tuple[str, ...]]  # of the output files: an image NAME gives NAME + ending
    model: Any  # nn.Module with dataset_meta

    def __init__(self, config: Config, device: torch.device, args: Namespace) -> None:
        with warnings.catch_warnings(record=True):  # about the missing checkpoint, which is loaded next
            self.model = self.build(config, device)
        self.args = args

    @abstractmethod
    def build(self, config: Config, device: torch.device) -> nn.Module:
        """Build the model in evaluation mode, without loading weights."""

    @abstractmethod
    def predict(self, image: np.ndarray, stem: Path) -> tuple[dict[str, Any], str]:
        """Predict on one image and write all files except the JSON to ``stem`` + ending.

        Args:
            image: (H, W, 3) in uint8, in OpenMMLab's order BGR.
            stem: path of the output files without their endings.

        Returns:
            The content of the JSON (``width`` and ``height`` of the image, and predictions) and a short summary.
        """


def common_parser(description: str, task: str, config: str) -> Parser:
    """The options that ``detection`` and ``segmentation`` share; ``config`` is the one in the example of ``--help``."""
    parser = Parser(f"python -m spatial_mamba.{task}", description, f"photo.jpg --config {config} --checkpoint FILE")
    images = "image file, folder (without its subfolders), or pattern"
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=images)
    parser.add_argument("--config", required=True, help="config file, or the name of one that comes with the package")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="trained weights")
    parser.add_argument(
        "--out-dir", type=Path, default=f"output/{task}", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files that ``paths`` name, see ``image_files.find_images``; each is decoded once as a check.

    Raises:
        ImageFileError: naming a path that is missing, not an image or damaged, or a folder or pattern without images.
    """
    images = image_files.find_images(paths)
    for image in images:
        image_files.read_image(image)
    return images


def read_pixels(path: Path) -> np.ndarray:
    """Read an image with ``image_files.read_image``, in the form that ``Predictor.predict`` takes."""
    return np.asarray(image_files.read_image(path))[..., ::-1].copy()


def plan_outputs(images: Sequence[Path], folder: Path, endings: Sequence[str]) -> dict[Path, Path]:
    """Map every image to the path of its output files without their endings.

    Raises:
        UserError: if two images share an output file, an output would overwrite an image, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out-dir: {folder} is not a folder")
    writers: dict[Path, Path] = {}
    for image in images:
        for ending in endings:
            output = folder / f"{image.stem}{ending}"
            if output in writers:
                raise UserError(
                    f"{writers[output]} and {image} would both be written to {output}; rename one or use two folders"
                )
            writers[output] = image
    resolved = {image.resolve() for image in images}
    for output in writers:
        if output.resolve() in resolved:
            raise UserError(f"{output} is an input image and would be overwritten; choose another --out-dir")
    return {image: folder / image.stem for image in images}


def load_weights(model: Any, checkpoint: Mapping[str, Any], path: Path, config: Config) -> None:
    """Load the weights of a checkpoint strictly, and set ``model.dataset_meta``: names and colours of the classes.

    These come from the checkpoint, or else from the test data set of the config.

    Raises:
        WeightsError: if the checkpoint does not fit the model.
        UserError: if the number of class names differs from the model's number of classes.
    """
    load_strictly(model, state_dict_of(checkpoint, path), path)
    meta = checkpoint.get("meta", {}).get("dataset_meta") or {}
    meta = {key.lower(): value for key, value in meta.items()}
    source = str(path)
    if not meta.get("classes"):
        source = "the config's test data set"
        meta = dict(DATASETS.build({**config.test_dataloader.dataset, "lazy_init": True}).metainfo)
    names = meta.get("classes") or ()
    if wrong := other_counts(model, len(names)):
        raise UserError(f"{source} names {len(names)} classes, but {wrong}; use the matching config")
    model.dataset_meta = meta


def predict(kind: type[Predictor], parser: Parser, argv: Sequence[str] | None) -> None:
    """Predict on the images that the command line names.

    Raises:
        UserError, WeightsError, ImageFileError: naming what is wrong, before the first image.
    """
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="mm(cv|engine|det|seg)")  # meant for the developers of these packages
    device = chosen_device(args.device)
    config = load_config(kind.package, args.config)
    images = find_images(args.images)
    outputs = plan_outputs(images, args.out_dir, kind.endings)
    checkpoint = read_checkpoint(args.checkpoint)

    init_default_scope(kind.package)
    predictor = kind(config, device, args)
    load_weights(predictor.model, checkpoint, args.checkpoint, config)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for image, stem in outputs.items():
        prediction, summary = predictor.predict(read_pixels(image), stem)
        record = {"image": str(image), "config": args.config, "checkpoint": str(args.checkpoint), **prediction}
        # with_suffix would cut a name such as "scene.1".
        Path(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{image}: {summary} -> {stem}.png", flush=True)
