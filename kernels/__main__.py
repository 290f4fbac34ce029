"""Report the backend used for each device and dtype, and why no faster one is; compile libraries, check backends."""

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import backends, build, native, self_test
from .command_line import Parser, run_command
from .errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(_command, argv)


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command == "check":
        return int(not self_test.check(torch.device(arguments.device), arguments.backend, arguments.dtype))
    if arguments.command == "build":
        _build(arguments)
    else:
        print(report())
    return 0


def _build(arguments: argparse.Namespace) -> None:
    names = arguments.names
    for name in names:
        if name not in build.LIBRARIES:
            raise UserError(f"there is no library {name!r}: choose from {', '.join(build.LIBRARIES)}")
    if arguments.missing:
        if not names or arguments.portable or arguments.out:
            raise UserError("--missing: name libraries, without --portable and --out, as in build cuda --missing")
        usable = [name for name in names if _usable(name)]
        for name in usable:
            print(f"{name}: works here as it is")
        names = [name for name in names if name not in usable]
        if not names:
            return
    try:
        build.build(names, arguments.arch, arguments.out, portable=arguments.portable)
    except build.BuildError as error:
        raise UserError(str(error)) from error
    if arguments.out and arguments.out.absolute() != build.library_folder().absolute():
        print(f"to use these libraries: export {build.FOLDER_VARIABLE}={arguments.out.absolute()}")


def _parser() -> Parser:
    parser = Parser("spatial-mamba kernels", __doc__, "check")
    commands = parser.add_subparsers(dest="command")
    builder = commands.add_parser("build", help="compile the libraries for this machine", example="cpu cuda --arch 9.0")
    builder.add_argument("names", nargs="*", metavar="cpu|cuda", help="default: cpu, and cuda if possible")
    builder.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="9.0",
        help="compute capabilities; default: TORCH_CUDA_ARCH_LIST, else those of the GPUs here, else "
        + ", ".join(build.ARCHITECTURES),
    )
    builder.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {build.library_folder()}")
    builder.add_argument("--missing", action="store_true", help="skip named libraries that work here as they are")
    levels = ", ".join(build.levels()) or "none for this architecture"
    builder.add_argument("--portable", action="store_true", help=f"compile cpu for other processors too: {levels}")
    checker = commands.add_parser("check", help="compare the backends with float64", example="--device cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checker.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    checker.add_argument("--backend", nargs="+", choices=backends.BACKENDS, default=[], help="default: all usable ones")
    checker.add_argument(
        "--dtype", nargs="+", choices=list(self_test.TOLERANCES), default=[], help="default: those of each backend"
    )
    return parser


def _usable(library: str) -> bool:
    """Whether a library is loaded and, for cuda, has code for every GPU present."""
    gpus = [device.capability for device in _devices() if device.capability] if library == "cuda" else []
    return bool(native.loaded(library)) and all(map(native.kernels_for, gpus))


@dataclass(frozen=True)
class Device:
    """A kind of device that tensors can be on: the CPU, or the GPUs of one compute capability."""

    type: str
    name: str
    capability: tuple[int, int] | None = None
    absent: bool = False


def report() -> str:
    """The backend used for each device and dtype, why not the others, and the libraries and versions found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report covers the hints that operators give
        serving = {device: [_serving(device, dtype) for dtype in DTYPES] for device in _devices()}
    return "\n\n".join("\n".join(part) for part in (_table(serving), _backends(serving), _libraries(), _found()))


def _devices() -> list[Device]:
    gpus: dict[tuple[int, int], Device] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        name = "{} ({}.{})".format(torch.cuda.get_device_name(index), *capability)
        gpus.setdefault(capability, Device("cuda", name, capability))
    no_gpu = Device("cuda", "no GPU that PyTorch can use", absent=True)
    return [Device("cpu", _processor()), *(gpus.values() or [no_gpu])]


def _serving(device: Device, dtype: torch.dtype) -> str:
    if device.absent:
        return "-"
    try:
        return backends.serving(device.type, dtype, device.capability)
    except RuntimeError as error:
        return f"error: {error}"


def _table(serving: dict[Device, list[str]]) -> list[str]:
    """One line per device, one column per dtype."""
    lines = [_row("serving", *map(_short, DTYPES))]
    for device, names in serving.items():
        lines.append(_row(device.type, *(name.partition(":")[0] for name in names), device.name))
        lines += dict.fromkeys(f"  {name}" for name in names if name.startswith("error"))
    return lines


def _backends(serving: dict[Device, list[str]]) -> list[str]:
    """For each device, from the fastest backend to the slowest: what it serves, or why it does not."""
    lines = ["backends, fastest first"]
    for device, names in serving.items():
        for backend in backends.PREFERENCE[device.type]:
            verdicts: dict[str, list[str]] = {}
            for dtype, name in zip(DTYPES, names, strict=True):
                verdict = "serves" if name == backend else _why_not(backend, device, dtype)
                verdicts.setdefault(verdict, []).append(_short(dtype))
            for verdict, dtypes in verdicts.items():
                which = "" if len(dtypes) == len(DTYPES) else ", ".join(dtypes) + ": "
                lines.append(f"  {backend:<8}on {device.type:<6}{which}{verdict}")
    return lines


def _why_not(backend: str, device: Device, dtype: torch.dtype) -> str:
    reason = backends.why_not(backend, device.type, dtype, device.capability)
    if reason is None:
        return f"usable, but there is {device.name}" if device.absent else "usable"
    if native.BUILD_COMMAND in reason:
        try:
            build.prepare(backend)
        except build.BuildError as obstacle:
            return f"{reason}; but {obstacle}"
    return reason


def _libraries() -> list[str]:
    """The libraries, and the facts of the native ones and of those in use that differ from this environment's."""
    lines = [f"libraries, in {build.library_folder()}"]
    for name in build.LIBRARIES:
        libraries = native.libraries(name)
        lines += [] if libraries else [f"  {name}.so: none"]
        for library in libraries:
            facts = native.read_facts(library)
            is_portable, is_used = "level" in facts, bool(facts) and facts == native.loaded(name)
            kind = f"portable, {library.parent}" if is_portable else "native"
            lines.append(f"  {library.name}, {kind}" + ", in use" * is_used)
            if is_used or not is_portable:
                here = build.environment(is_portable)
                lines += (_shortened(f"    {key}: {value}") for key, value in facts.items() if here.get(key) != value)
    return lines


def _found() -> list[str]:
    """Versions, and environment variables that override defaults."""
    triton = native.triton_version() or "none"
    of_package = (backends.FORCE_VARIABLE, backends.REQUIRE_VARIABLE, build.FOLDER_VARIABLE, native.LEVEL_VARIABLE)
    variables = (*of_package, "TRITON_INTERPRET")
    forced = [f"{variable}={os.environ[variable]}" for variable in variables if os.environ.get(variable)]
    return [
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, Triton {triton}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"forced by the environment: {', '.join(forced) or 'nothing'}",
        "self-test of the backends: spatial-mamba kernels check",
    ]


def _processor() -> str:
    features = build.cpu_features()
    shown = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve") if name in features]
    return f"{torch.get_num_threads()} threads" + (f", {' '.join(shown)}" if shown else "")


def _shortened(line: str) -> str:
    return line if len(line) <= 120 else f"{line[:117]}..."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(*cells: str) -> str:
    return "".join(cell.ljust(10) for cell in cells).rstrip()


if __name__ == "__main__":
    sys.exit(main())
