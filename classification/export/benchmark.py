"""Times exported files beside the model itself on the CPU: ``python -m spatial_mamba.classification.export.benchmark``.

All run in turn in every round, so that what else the machine does falls on all alike; medians over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ...kernels import use_backend
from ...kernels.benchmark.report import environment
from ..command_line import Parser, run_command
from .check import fixed_images
from .onnx_file import export_onnx, onnx_facts, onnx_session, require_onnx
from .programs import export_aoti, height_and_width, require_compiler

COMPARED_IMAGES = 16  # whose logits are compared
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One way to run the model; what it takes on the disk and to make, where there is a file."""

    name: str
    call: Call
    megabytes: float
    seconds: float | None = None
    nodes: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser("python -m spatial_mamba.classification.export.benchmark", description=__doc__)
    parser.add_argument("--model", choices=timm.list_models("spatial_mamba_*"), default="spatial_mamba_tiny")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(224, 224))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--aoti", action="store_true", help="also AOTInductor, which compiles for minutes")
    args = parser.parse_args(argv)
    require_onnx()
    if args.aoti:
        require_compiler()
    size = height_and_width(tuple(args.size))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()

    with tempfile.TemporaryDirectory() as folder:
        forms = _forms(model, size, Path(folder), args)
        images = fixed_images(model, size, args.batch)
        milliseconds = _medians(forms, images, args.rounds)
        compared = fixed_images(model, size, COMPARED_IMAGES)
        expected = _logits(forms[0].call, compared)
        facts = environment(torch.device("cpu")) | {
            name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")
        }
        print("; ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
        print(f"\n{args.model}, {size[0]}x{size[1]}, batch {args.batch}, {args.threads} threads\n")
        print("| | ms | x definition | MB | nodes | export s | logits differ by | same top-1 |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for form, ms in zip(forms, milliseconds, strict=True):
            logits = _logits(form.call, compared)
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            same = (logits.argmax(1) == expected.argmax(1)).sum().item()
            cells = (
                form.name,
                f"{ms:.1f}",
                f"{ms / milliseconds[0]:.2f}",
                f"{form.megabytes:.1f}",
                "" if form.nodes is None else form.nodes,
                "" if form.seconds is None else f"{form.seconds:.0f}",
                f"{difference:.1e}",
                f"{same} of {COMPARED_IMAGES}",
            )
            print(f"| {' | '.join(map(str, cells))} |")


def _forms(model: nn.Module, size: tuple[int, int], folder: Path, args: argparse.Namespace) -> list[Form]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in favour of a package of its own
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.save(quantised.state_dict(), folder / "quantised.pth")
    forms = [
        Form("PyTorch, definition", _eager(model, "torch"), weights),
        Form("PyTorch, this package's operators", _eager(model), weights),
        Form("the same after fuse()", _eager(deepcopy(model).fuse()), weights),
        Form("PyTorch, linear layers in int8", _eager(quantised), (folder / "quantised.pth").stat().st_size / 1e6),
    ]
    for name, int8 in (("ONNX Runtime", False), ("ONNX Runtime, int8", True)):
        path = folder / f"{name}.onnx"
        start = time.perf_counter()
        export_onnx(model, path, size, int8=int8)
        seconds = time.perf_counter() - start
        session = onnx_session(path, args.threads)

        def run(images: Tensor, session: object = session) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        forms.append(Form(name, run, path.stat().st_size / 1e6, seconds, onnx_facts(path).nodes))
    if args.aoti:
        path = folder / "package.pt2"
        start = time.perf_counter()
        export_aoti(model, path, size)
        seconds = time.perf_counter() - start
        package = torch._inductor.aoti_load_package(str(path))
        forms.append(Form("AOTInductor", package, path.stat().st_size / 1e6, seconds))
    return forms


def _eager(model: nn.Module, backend: str | None = None) -> Call:
    def call(images: Tensor) -> Tensor:
        with torch.inference_mode(), use_backend(backend) if backend else nullcontext():
            return model(images)

    return call


def _medians(forms: Sequence[Form], images: Tensor, rounds: int) -> list[float]:
    """Milliseconds of each form."""
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(rounds):
        for form, taken in zip(forms, times, strict=True):
            form.call(images)  # the caches hold what this form reads
            start = time.perf_counter()
            form.call(images)
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def _logits(call: Call, images: Tensor) -> Tensor:
    return torch.cat([call(image[None]).clone() for image in images])


if __name__ == "__main__":
    sys.exit(main())
