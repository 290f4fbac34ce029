"""Export a classifier to a file that runs without this package: ONNX, a `torch.export` program, or AOTInductor."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.command_line import Parser, run_command
from ...kernels.errors import UserError
from ..atomic_write import atomic_write
from ..command_line import add_model_options, chosen_model
from ..models.preprocessing import CROP_FRACTION, NORMALISATION
from ..models.spatial_mamba import SpatialMamba
from ..models.trained import TrainedClassifier
from .check import Function, largest_difference
from .onnx_file import export_onnx, onnx_facts, onnx_function, require_exporter
from .programs import export_aoti, export_program, height_and_width, require_compiler

TOLERANCE = 1e-4  # of the largest logit
INT8_TOLERANCE = 0.5  # only detects broken files; the accuracy must be measured on images


@dataclass(frozen=True)
class Format:
    """A file format: its ending, the function that writes it, and the one that loads it as a function of images."""

    ending: str
    write: Callable[[SpatialMamba, Path, argparse.Namespace, dict[str, str]], None]
    read: Callable[[Path, torch.device], Function]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    _check_options(args)
    classifier = chosen_model(args)
    model = classifier.model
    if not args.size:
        args.size = (classifier.preprocessing.image_size,)
    args.size = height_and_width(args.size[0] if len(args.size) == 1 else tuple(args.size))
    if args.output is None:
        kind = "_int8" if args.int8 else "_aoti" if args.format == "aoti" else ""
        name = args.checkpoint.stem if args.checkpoint else args.model
        args.output = Path(f"{name}{kind}{FORMATS[args.format].ending}")
    _check_output(args.output)

    start = time.perf_counter()
    print(f"{args.output}: exporting", file=sys.stderr)
    try:
        with atomic_write(args.output) as unfinished:
            FORMATS[args.format].write(model, unfinished, args, metadata_of(classifier, args.size))
            exported = time.perf_counter()
            print(f"{args.output}: checking the outputs", file=sys.stderr)
            function = FORMATS[args.format].read(unfinished, next(model.parameters()).device)
            difference = largest_difference(function, model, args.size)
            tolerance = INT8_TOLERANCE if args.int8 else TOLERANCE
            if not difference <= tolerance:
                raise UserError(
                    f"{args.output}: not written, since its logits differ from the model's by {difference:.2g} of the "
                    f"largest, more than {tolerance:g}; please report the model and the versions of the packages"
                )
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error.strerror or error})") from error
    seconds = (exported - start, time.perf_counter() - exported)
    print(_report(args, model, difference, seconds))


def metadata_of(classifier: TrainedClassifier, size: tuple[int, int]) -> dict[str, str]:
    """What is needed to use the file, each value in JSON.

    Args:
        classifier: the exported classifier.
        size: height and width of the images.

    Returns:
        ``variant``; ``image_size``: height and width; ``mean`` and ``std``: per channel, of pixels from 0 to 1;
        ``crop``: whether the centre is cropped, ``crop_fraction`` of the short side, or the image is squashed;
        ``interpolation``; and, if known, ``class_names``.
    """
    preprocessing = classifier.preprocessing
    facts = {
        "variant": classifier.architecture.variant,
        "image_size": size,
        **NORMALISATION,
        "crop": preprocessing.crop,
        "crop_fraction": CROP_FRACTION if preprocessing.crop else 1.0,
        "interpolation": preprocessing.interpolation,
    }
    if classifier.class_names is not None:
        facts["class_names"] = classifier.class_names
    return {name: json.dumps(value) for name, value in facts.items()}


def _write_onnx(model: SpatialMamba, path: Path, args: argparse.Namespace, metadata: dict[str, str]) -> None:
    export_onnx(model, path, args.size, metadata, args.int8)


def _write_program(model: SpatialMamba, path: Path, args: argparse.Namespace, metadata: dict[str, str]) -> None:
    torch.export.save(export_program(model, args.size), path, extra_files=metadata)


def _write_aoti(model: SpatialMamba, path: Path, args: argparse.Namespace, metadata: dict[str, str]) -> None:
    export_aoti(model, path, args.size, metadata)


def _read_program(path: Path, device: torch.device) -> Function:
    module = torch.export.load(path).module()
    return lambda images: module(images.to(device))


def _read_aoti(path: Path, device: torch.device) -> Function:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: package(images.to(device))


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, lambda path, device: onnx_function(path)),
    "torch": Format(".pt2", _write_program, _read_program),
    "aoti": Format(".pt2", _write_aoti, _read_aoti),
}


def _check_options(args: argparse.Namespace) -> None:
    """Determine the format, and refuse contradictory options before any work.

    Raises:
        UserError: naming the option.
    """
    if args.size and len(args.size) > 2:
        raise UserError(f"--size {' '.join(map(str, args.size))}: give one number, or height and width")
    if args.format is None:
        endings = {".onnx": "onnx", ".pt2": "torch"}
        args.format = endings.get(args.output.suffix) if args.output else "onnx"
        if args.format is None:
            raise UserError(f"--output {args.output}: must end in .onnx or .pt2, or give a --format")
    ending = FORMATS[args.format].ending
    if args.output and args.output.suffix != ending:
        raise UserError(f"--output {args.output}: a file of the format {args.format} must end in {ending}")
    if args.int8 and args.format != "onnx":
        raise UserError(f"--int8: only ONNX files are quantised, not the format {args.format}; use --format onnx")
    if args.format != "aoti":
        if args.device == "cuda":
            raise UserError(f"--device cuda: a file of the format {args.format} runs on any device; omit the option")
        args.device = "cpu"
    if args.format == "onnx":
        require_exporter()
    if args.format == "aoti":
        require_compiler()


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name the file to write")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} is not writable")


def _report(args: argparse.Namespace, model: torch.nn.Module, difference: float, seconds: tuple[float, float]) -> str:
    height, width = args.size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    what = {"torch": "program of torch.export", "aoti": f"AOTInductor package for {next(model.parameters()).device}"}
    if args.format == "onnx":
        facts = onnx_facts(args.output)
        what["onnx"] = f"ONNX, opset {facts.opset}, {facts.nodes} nodes"
    int8 = ", linear layers in int8" if args.int8 else ""
    return "\n".join(
        (
            f"{args.output}: {what[args.format]}{int8}; images (batch, {model.in_chans}, {height}, {width})",
            f"{args.output.stat().st_size / 1e6:.1f} MB, the model's weights {weights / 1e6:.1f} MB",
            f"largest difference from the model {difference:.1e} of the largest logit, batches of 1 and 2",
            f"exported in {seconds[0]:.0f} s, checked in {seconds[1]:.0f} s",
        )
    )


def _parser() -> Parser:
    parser = Parser("spatial-mamba export", __doc__, "--checkpoint spatialmamba_tiny.pth --output tiny.onnx")
    add_model_options(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: from the ending of --output, else onnx")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="images: one side, or height and width (default: the size of evaluation)",
    )
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers; ONNX only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: named after the model, in this folder")
    return parser
