"""Inspect, convert and verify checkpoint files; nothing that a file contains is executed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ...kernels.command_line import Parser, run_command
from ...kernels.errors import UserError
from ..models.architecture import VARIANTS
from .conversion import LAYOUTS, convert_file
from .inspection import inspect_file, text_of
from .verification import IMAGE_SIZE, verify_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    args.run(args)


def _parser() -> Parser:
    parser = Parser("spatial-mamba checkpoint", __doc__, "inspect spatialmamba_tiny.pth")
    commands = parser.add_subparsers(required=True, metavar="inspect|convert|verify")

    inspect = commands.add_parser("inspect", help="show what a file contains", example="spatialmamba_tiny.pth")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    _add_prefix(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert", help="write a file in another layout", example="spatialmamba_tiny.pth tiny.safetensors --ema"
    )
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path, help="FILE.safetensors, for weights only, or FILE.pth")
    convert.add_argument("--to", choices=LAYOUTS, default="classifier", help="layout (default: %(default)s)")
    convert.add_argument("--ema", action="store_true", help="use the EMA weights")
    _add_prefix(convert)
    convert.set_defaults(run=_convert)

    verify = commands.add_parser(
        "verify", help="load a file strictly, print the digest of its weights", example="spatialmamba_tiny.pth"
    )
    verify.add_argument("file", type=Path)
    verify.add_argument("--ema", action="store_true", help="verify the EMA weights")
    _add_prefix(verify)
    verify.add_argument("--variant", choices=tuple(VARIANTS), help="fail if the file holds another")
    verify.add_argument("--expect", metavar="DIGEST", help="fail unless the digest of the weights starts with this")
    verify.set_defaults(run=_verify)
    return parser


def _add_prefix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", default="", help="prefix of the weights' names, if the file holds several models")


def _inspect(args: argparse.Namespace) -> None:
    found = inspect_file(args.file, args.prefix)
    print(json.dumps(found) if args.json else text_of(found))


def _convert(args: argparse.Namespace) -> None:
    convert_file(args.file, args.output, args.to, args.ema, args.prefix)
    print(text_of(inspect_file(args.output)))


def _verify(args: argparse.Namespace) -> None:
    if args.expect is not None and len(args.expect) < 8:
        raise UserError(f"--expect {args.expect}: give at least the first 8 digits of the digest")
    verified = verify_file(args.file, args.ema, args.prefix)
    architecture = verified.architecture
    if args.variant and architecture.variant != args.variant:
        raise UserError(f"{args.file}: holds {architecture}, not {args.variant}")
    print(f"loads strictly as {architecture}")
    print(f"weights  sha256 {verified.weights}")
    if verified.top5:
        largest = ", ".join(f"class {index} {logit:.6g}" for index, logit in verified.top5.items())
        print(f"largest logits of the fixed image ({IMAGE_SIZE}x{IMAGE_SIZE}): {largest}")
    if args.expect and not verified.weights.startswith(args.expect.lower()):
        raise UserError(f"{args.file}: the digest of its weights is {verified.weights}, not {args.expect}")
