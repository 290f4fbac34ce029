"""Looks into checkpoint files, converts them, and verifies them; nothing that a file contains is executed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..command_line import Parser, run_command
from ..errors import InputError
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
    parser = Parser("python -m spatial_mamba.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="inspect|convert|verify")

    inspect = commands.add_parser("inspect", help="tell what is in a file")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    _add_prefix(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a file in another layout")
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path, help="ends in .safetensors, for weights alone, or in .pth")
    convert.add_argument("--to", choices=LAYOUTS, default="classifier", help="layout (default: %(default)s)")
    convert.add_argument("--ema", action="store_true", help="take the EMA weights")
    _add_prefix(convert)
    convert.set_defaults(run=_convert)

    verify = commands.add_parser("verify", help="load a file strictly, print digests of its weights and its outputs")
    verify.add_argument("file", type=Path)
    verify.add_argument("--ema", action="store_true", help="verify the EMA weights")
    _add_prefix(verify)
    verify.add_argument("--variant", choices=("tiny", "small", "base"), help="it is an error if the file holds another")
    verify.add_argument("--expect", metavar="DIGEST", help="of the outputs, or the start of it; else an error")
    verify.set_defaults(run=_verify)
    return parser


def _add_prefix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", default="", help="of the names of the weights, if the file has several models")


def _inspect(args: argparse.Namespace) -> None:
    found = inspect_file(args.file, args.prefix)
    print(json.dumps(found) if args.json else text_of(found))


def _convert(args: argparse.Namespace) -> None:
    convert_file(args.file, args.output, args.to, args.ema, args.prefix)
    print(text_of(inspect_file(args.output)))


def _verify(args: argparse.Namespace) -> None:
    if args.expect is not None and len(args.expect) < 8:
        raise InputError(f"--expect {args.expect}: give at least the first 8 digits of the digest")
    verified = verify_file(args.file, args.ema, args.prefix)
    architecture = verified.architecture
    if args.variant and architecture.variant != args.variant:
        raise InputError(f"{args.file}: holds {architecture}, not {args.variant}")
    print(f"loads strictly as {architecture}")
    print(f"weights  sha256 {verified.weights}")
    if verified.top5:
        largest = ", ".join(f"class {index} {logit:.6g}" for index, logit in verified.top5.items())
        print(f"largest logits of the fixed image ({IMAGE_SIZE}x{IMAGE_SIZE}): {largest}")
    if args.expect and not verified.weights.startswith(args.expect.lower()):
        raise InputError(f"{args.file}: the digest of its weights is {verified.weights}, not {args.expect}")
