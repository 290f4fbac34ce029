"""Draw what a model computes and how it was trained, as PNG, PDF or SVG."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from ...kernels.command_line import Parser, run_command, whole_number
from ...kernels.errors import UserError
from ..command_line import add_model_options, chosen_device, chosen_model, image_size
from ..models import SpatialMamba
from ..models.image_files import find_images
from ..models.trained import TrainedClassifier, load_classifier, untrained_classifier
from .inputs import model_input, preprocessing_at, require_rgb, single_image, visible_image
from .layers import fusion_change, most_changed, parse_layer, read_layer
from .receptive_field import FRACTIONS, ReceptiveField, noise_batches, receptive_field
from .run_records import read_run, short_labels

ENDINGS = (".png", ".pdf", ".svg")
BATCH_SIZE = 4  # with gradients of the images


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    from . import style  # noqa: F401, reports a missing matplotlib before any work

    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; name a file in it that ends in {', '.join(ENDINGS)}")
    args.run(args)
    print(args.output)


def _parser() -> Parser:
    parser = Parser("spatial-mamba visualize", __doc__, "states photo.jpg --checkpoint spatialmamba_tiny.pth")
    commands = parser.add_subparsers(required=True, metavar="states|attention|receptive-field|curves")

    states = commands.add_parser(
        "states",
        help="states of a scan before and after fusion",
        example="photo.jpg --checkpoint spatialmamba_tiny.pth",
    )
    _add_image_options(states, "the last of the first stage")
    states.add_argument(
        "--channel",
        type=_channel,
        metavar="N|auto",
        help="channel of the states; auto (default): the three that fusion changes most",
    )
    _finish(states, "states.png", _states)

    attention = commands.add_parser(
        "attention",
        help="the matrix M of y = M u: the weights of one token, and y",
        example="photo.jpg --checkpoint spatialmamba_tiny.pth --query 7 7",
    )
    _add_image_options(attention, "the last of the second stage")
    attention.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("ROW", "COL"),
        help="token of the layer's map, from 0 (default: the middle)",
    )
    _finish(attention, "attention.png", _attention)

    field = commands.add_parser(
        "receptive-field",
        help="effective receptive fields, side by side",
        example="photos/ --checkpoint spatialmamba_tiny.pth --untrained",
    )
    field.add_argument(
        "image",
        nargs="*",
        metavar="IMAGE",
        help="image file, folder (without its subfolders) or pattern; default: noise",
    )
    field.add_argument("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE", help="weights")
    names = timm.list_models("spatial_mamba_*")
    field.add_argument("--model", nargs="+", default=[], choices=names, help="untrained models")
    field.add_argument("--untrained", action="store_true", help="also draw each checkpoint's model before training")
    field.add_argument("--ema", action="store_true", help="use the EMA weights of the checkpoints")
    field.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    field.add_argument("--images", type=whole_number, default=16, metavar="N", help="of noise (default: %(default)s)")
    field.add_argument("--stage", type=int, metavar="N", help="stage of the centre token, from 0 (default: last)")
    field.add_argument("--size", type=image_size, metavar="N", help="side of the images (default: as in evaluation)")
    field.add_argument("--labels", nargs="+", metavar="TEXT", help="of the models, in the order of the panels")
    _finish(field, "receptive-field.png", _receptive_field)

    curves = commands.add_parser("curves", help="training curves of runs", example="output/spatialmamba_tiny/default")
    curves.add_argument("record", type=Path, nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    curves.add_argument("--labels", nargs="+", metavar="TEXT", help="of the runs")
    _finish(curves, "curves.png", _curves)
    return parser


def _add_image_options(parser: argparse.ArgumentParser, default_layer: str) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE")
    add_model_options(parser)
    parser.add_argument("--layer", metavar="STAGE.BLOCK", help=f"both from 0 (default: {default_layer})")
    parser.add_argument("--size", type=image_size, metavar="N", help="side of the image (default: as in evaluation)")


def _finish(parser: argparse.ArgumentParser, output: str, run: object) -> None:
    parser.add_argument(
        "--output", type=_picture, default=Path(output), metavar="FILE", help="PNG, PDF or SVG (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _states(args: argparse.Namespace) -> None:
    from .states_picture import draw_states
    from .style import save

    path = single_image(args.image)
    classifier = chosen_model(args)
    stage, block = parse_layer(args.layer, classifier.model, default_stage=0)
    width = classifier.model.layers[stage].blocks[block].self_attention.inner_dim
    if args.channel is not None and args.channel >= width:
        raise UserError(f"--channel {args.channel}: layer {stage}.{block} has channels 0 to {width - 1}")
    images = model_input(classifier, [path], args.size)
    layer = read_layer(classifier.model, images, stage, block)
    before, after = layer.states(), layer.fused_states()
    channels = [args.channel] if args.channel is not None else most_changed(fusion_change(before, after), 3)
    name = f"layer {stage}.{block}"
    save(draw_states(visible_image(images[0]), before, after, channels, name), args.output)


def _attention(args: argparse.Namespace) -> None:
    from .attention_picture import draw_attention
    from .style import save

    path = single_image(args.image)
    classifier = chosen_model(args)
    stage, block = parse_layer(args.layer, classifier.model, default_stage=1)
    images = model_input(classifier, [path], args.size)
    layer = read_layer(classifier.model, images, stage, block)
    row, column = (layer.height // 2, layer.width // 2) if args.query is None else args.query
    if not (0 <= row < layer.height and 0 <= column < layer.width):
        rows, columns = layer.height - 1, layer.width - 1
        raise UserError(
            f"--query {row} {column}: layer {stage}.{block} has rows 0 to {rows} and columns 0 to {columns}"
        )
    name = f"layer {stage}.{block}"
    save(draw_attention(visible_image(images[0]), layer, row, column, name), args.output)


def _receptive_field(args: argparse.Namespace) -> None:
    from .receptive_field_picture import draw_receptive_fields
    from .style import save

    paths = find_images(args.image)
    models = _compared_models(args)
    stages = [_stage(classifier.model, args.stage) for _, classifier in models]
    fields = [
        (label, _measured(args, classifier, paths, stage))
        for (label, classifier), stage in zip(models, stages, strict=True)
    ]
    images = f"{len(paths)} images" if paths else f"{args.images} images of noise"
    which = "last stage" if args.stage is None else f"stage {args.stage}"
    text = (
        f"Absolute gradient of the features of the centre token, {which}; mean over {images}. "
        "Squares hold 50 and 90 % of it."
    )
    for label, field in fields:
        areas = ", ".join(f"{100 * fraction:g} % in {100 * field.area(fraction):.1f} %" for fraction in FRACTIONS)
        print(f"{label}: {areas} of the image")
    save(draw_receptive_fields(fields, text), args.output)


def _compared_models(args: argparse.Namespace) -> list[tuple[str, TrainedClassifier]]:
    """The models of the options, with their labels, on the device asked for."""
    from .style import COLOURS

    if not args.checkpoint and not args.model:
        raise UserError("name one or more models: --checkpoint FILE ... or --model NAME ...")
    if not args.checkpoint and (args.ema or args.untrained):
        raise UserError("--ema and --untrained go with a --checkpoint")
    device = chosen_device(args.device)
    models: list[tuple[str, TrainedClassifier]] = []
    for label, path in zip(short_labels(args.checkpoint), args.checkpoint, strict=True) if args.checkpoint else ():
        trained = load_classifier(path, ema=args.ema)
        if args.untrained:
            models.append((f"{label}, untrained", _untrained_twin(trained)))
        models.append((label, trained))
    for name in args.model:
        models.append((f"{name}, untrained", untrained_classifier(name)))
    if len(models) > len(COLOURS):
        raise UserError(f"{len(models)} models do not fit in one picture; name at most {len(COLOURS)}")
    labels = _labels(args.labels, [label for label, _ in models])
    for _, classifier in models:
        require_rgb(classifier)
        classifier.model.to(device)
    return [(label, classifier) for label, (_, classifier) in zip(labels, models, strict=True)]


def _untrained_twin(trained: TrainedClassifier) -> TrainedClassifier:
    """An untrained model of the same architecture, for images prepared in the same way."""
    torch.manual_seed(0)
    model = SpatialMamba(**trained.architecture.options()).eval()
    return TrainedClassifier(model, trained.preprocessing)


def _stage(model: SpatialMamba, stage: int | None) -> int:
    count = len(model.layers)
    if stage is None:
        return count - 1
    if not 0 <= stage < count:
        raise UserError(f"--stage {stage}: the model has stages 0 to {count - 1}")
    return stage


def _measured(
    args: argparse.Namespace, classifier: TrainedClassifier, paths: Sequence[Path], stage: int
) -> ReceptiveField:
    batches: Iterable[Tensor]
    if paths:
        firsts = tqdm(range(0, len(paths), BATCH_SIZE), unit="batch", disable=None)
        batches = (model_input(classifier, paths[i : i + BATCH_SIZE], args.size) for i in firsts)
    else:
        size = preprocessing_at(classifier, args.size).image_size
        batches = noise_batches(args.images, size, next(classifier.model.parameters()).device, BATCH_SIZE)
    return receptive_field(classifier.model, batches, stage)


def _curves(args: argparse.Namespace) -> None:
    from .curves_picture import draw_curves
    from .style import COLOURS, save

    if len(args.record) > len(COLOURS):
        raise UserError(f"{len(args.record)} runs do not fit in one picture; name at most {len(COLOURS)}")
    labels = _labels(args.labels, short_labels(args.record))
    runs = [read_run(path, label) for path, label in zip(args.record, labels, strict=True)]
    save(draw_curves(runs), args.output)


def _labels(given: Sequence[str] | None, default: Sequence[str]) -> Sequence[str]:
    if given is None:
        return default
    if len(given) != len(default):
        raise UserError(f"--labels: {len(given)} are given for {len(default)} in the picture: {'; '.join(default)}")
    return given


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(ENDINGS)}, got {text!r}")
    return path


def _channel(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be auto or a channel, from 0, got {text!r}")
    return int(text)
