"""Compile the libraries ``cpu.so`` and ``cuda.so`` from ``csrc/`` against the installed PyTorch.

``cpu.so`` is for this machine's processor; portable libraries such as ``cpu-x86-64-v3.so`` are for all processors of a
level. All are plain shared objects for ``torch.ops.load_library``, independent of the Python version. A JSON file of
the same name records what each was built for; `native` compares it with the running environment before it loads the
library.

``setup.py`` uses this module too, so it imports nothing from its package, and PyTorch only inside functions.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"
LIBRARIES = ("cpu", "cuda")
FOLDER_VARIABLE = "SPATIAL_MAMBA_LIB"
# With OpenMP, ATen's header-only at::parallel_for uses PyTorch's own thread pool.
FLAGS = {
    ("cpu", ".cpp"): ("-O3", "-fPIC", "-fopenmp"),
    ("cuda", ".cpp"): ("-O3", "-fPIC"),
    ("cuda", ".cu"): ("-O3", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"),
}
# Levels of the portable libraries, highest first: compiler flags, and features of the processor, as Linux names them.
_V2 = "cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3"
_V3 = f"{_V2} abm avx avx2 bmi1 bmi2 f16c fma movbe"
_V4 = f"{_V3} avx512bw avx512cd avx512dq avx512f avx512vl"
LEVELS = {
    "x86_64": {
        "x86-64-v4-bf16": (["-march=x86-64-v4", "-mavx512bf16"], f"{_V4} avx512_bf16"),
        "x86-64-v4": (["-march=x86-64-v4"], _V4),
        "x86-64-v3": (["-march=x86-64-v3"], _V3),
        "x86-64-v2": (["-march=x86-64-v2"], _V2),
    },
    "aarch64": {"armv8-a": (["-march=armv8-a"], "asimd fp")},
}
# Default on a machine without a GPU: Ampere, Ada, Hopper, Blackwell for servers and workstations.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TEMPORARY = ".build-"  # folders of running builds
ABANDONED_SECONDS = 3600  # after which such a folder is that of a killed build
# Headers that ATen includes and small toolkits lack; PyTorch's own dependencies contain them.
MATH_HEADERS = ("cusparse.h", "cublas_v2.h", "cusolverDn.h")
# Features that Linux and compilers spell differently, beyond underscores.
_MACRO_OF = {"pni": "sse3", "abm": "lzcnt", "sha_ni": "sha", "asimddp": "dotprod", "asimdhp": "fp16vectorarithmetic"}


class BuildError(Exception):
    """A library cannot be built here. The message says why and how to fix it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version (``"13.0"``) and the folder of its headers."""

    root: Path
    version: str
    include: Path

    @property
    def nvcc(self) -> str:
        return str(self.root / "bin/nvcc")

    def architectures(self) -> list[str]:
        """Compute capabilities that nvcc can compile for, lowest first."""
        listed = re.findall(r"compute_(\d+)(\d)\b", _output([self.nvcc, "--list-gpu-arch"]))
        return sorted((f"{major}.{minor}" for major, minor in listed), key=capability)


@dataclass(frozen=True)
class Plan:
    """How to build a library: sources, a compiler command per suffix, linker and its flags, the facts to record."""

    name: str
    sources: list[Path]
    compilers: dict[str, list[str]]
    linker: list[str]
    link_flags: list[str]
    facts: dict[str, str]


# --- what a library depends on ----------------------------------------------------------------------------------------


def library_folder() -> Path:
    """The folder of the libraries: ``SPATIAL_MAMBA_LIB``, or ``lib`` in the package."""
    return Path(os.environ.get(FOLDER_VARIABLE) or PACKAGE / "lib")


def portable_folder(folder: Path) -> Path:
    """The subfolder of ``folder`` for the portable libraries of the installed PyTorch."""
    return folder / f"torch-{_minor_release()}"


def environment(portable: bool = False) -> dict[str, str]:
    """The environment that a library must have been built for to run in this process, apart from the processor.

    A portable library serves all patch releases and builds of a minor release of PyTorch.
    """
    import torch

    exact = {"PyTorch": str(torch.__version__), "PyTorch's CUDA": torch.version.cuda or "none"}
    return {
        **({"PyTorch": _minor_release()} if portable else exact),
        "platform": f"{platform.system()} {platform.machine()}",
        "C++ ABI": "cxx11" if torch.compiled_with_cxx11_abi() else "pre-cxx11",
    }


def _minor_release() -> str:
    """``"2.11"`` for 2.11.0+cpu; the full version of a pre-release, whose interface may differ."""
    import torch

    final = re.match(r"(\d+\.\d+)\.\d+(\+|$)", torch.__version__)
    return final[1] if final else str(torch.__version__)


def levels() -> dict[str, tuple[list[str], str]]:
    """The levels of this architecture, see ``LEVELS``; empty if it has no portable libraries."""
    return LEVELS.get(platform.machine(), {})


def cpu_features() -> set[str]:
    """Instruction set extensions of this processor, as Linux names them; empty on other systems."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")  # x86, Arm
    except OSError:
        return set()
    return set(line.partition(":")[2].split())


def cxx_standard() -> str:
    """The C++ standard that the headers of the installed PyTorch need: ``"17"``, or ``"20"`` for newer releases.

    It is the one that PyTorch uses to compile extensions. The module that sets it is read as text, since importing it
    would search for compilers and GPUs.
    """
    source = (_torch_folder() / "utils/cpp_extension.py").read_text(encoding="utf-8")
    passed = Counter(re.findall(r"'-std=c\+\+(\d+)'", source))
    return passed.most_common(1)[0][0] if passed else "20"


def source_hash(name: str, sources: Path = SOURCES) -> str:
    """SHA-256 of the sources, shared headers and compiler flags of a library."""
    digest = hashlib.sha256(repr([flags for key, flags in FLAGS.items() if key[0] == name]).encode())
    for path in sorted([*sources.glob("*"), *(sources / name).rglob("*")]):
        if path.suffix not in (".cpp", ".cu", ".h", ".cuh"):
            continue
        digest.update(f"\n{path.relative_to(sources)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _used_features(compiler: Sequence[str]) -> list[str]:
    """The features of this processor that the compiler uses with ``-march=native``, according to its macros."""
    defined = _output([*compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])
    macros = re.findall(r"#define __(?:ARM_FEATURE_)?(\w+?)(?:__)?\s", defined)
    used = {macro.lower().replace("_", "") for macro in macros}
    return sorted(f for f in cpu_features() if _MACRO_OF.get(f, f.replace("_", "")) in used)


# --- compilers --------------------------------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``CXX``, or g++ or c++ from PATH.

    Raises:
        BuildError: if there is none.
    """
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["g++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    missing = f"CXX={chosen} was not found" if chosen else "neither g++ nor c++ is on PATH"
    raise BuildError(f"no C++ compiler: {missing} (for instance: apt install g++)")


def find_toolkit() -> Toolkit:
    """Find the CUDA toolkit with the major version of PyTorch's CUDA.

    Looks in ``CUDA_HOME``, ``CUDA_PATH``, around the nvcc on PATH, in /usr/local/cuda* and in NVIDIA's Python packages.

    Raises:
        BuildError: if PyTorch has no CUDA, or no toolkit matches.
    """
    import torch

    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError("PyTorch is built without CUDA here (builds with CUDA: https://pytorch.org/get-started)")
    major = wanted.split(".")[0]
    toolkits = []
    for root in _toolkit_folders(major):
        if toolkit := _toolkit_at(root):
            if toolkit.version.split(".")[0] == major:
                return toolkit
            toolkits.append(f"{toolkit.version} in {root}")
    found = f"found only {', '.join(toolkits)}" if toolkits else "found none; set CUDA_HOME to its folder"
    raise BuildError(f"a CUDA toolkit {major} is needed, to match PyTorch's CUDA {wanted}; {found}")


def _toolkit_folders(major: str) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob(f"cuda-{major}*"), reverse=True)
    yield from _nvidia_packages(f"cu{major}")


def _toolkit_at(root: Path) -> Toolkit | None:
    headers = [*root.glob("include/cuda_runtime.h"), *root.glob("targets/*/include/cuda_runtime.h")]
    if not headers or not (root / "bin/nvcc").exists():
        return None
    try:
        version = re.search(r"release (\d+\.\d+)", _output([str(root / "bin/nvcc"), "--version"]))
    except BuildError:
        return None
    return Toolkit(root, version[1], headers[0].parent) if version else None


def _nvidia_packages(pattern: str) -> list[Path]:
    """Folders of NVIDIA's Python packages, which are next to PyTorch's."""
    return sorted((_torch_folder().parent / "nvidia").glob(pattern))


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(command)} failed: {(getattr(error, 'stderr', None) or error)!s:.200}") from error


# --- what to run ------------------------------------------------------------------------------------------------------


def prepare(name: str, architectures: Sequence[str] = (), sources: Path = SOURCES, level: str = "") -> Plan:
    """Find out how to build a library here, without building it.

    Args:
        name: ``"cpu"`` or ``"cuda"``.
        architectures: compute capabilities to compile for, such as ``"9.0"``; by default those in
            ``TORCH_CUDA_ARCH_LIST``, otherwise those of the GPUs present, otherwise ``ARCHITECTURES``.
        sources: the folder with one folder of sources per library.
        level: one of `levels`, for a portable cpu library; without it, the library is for this processor.

    Raises:
        BuildError: if it cannot be built here: system, sources, compiler, toolkit, architecture.
    """
    if platform.system() != "Linux":
        raise BuildError(f"native code can only be built on Linux, but this is {platform.system()}")
    files = sorted(path for path in (sources / name).rglob("*") if (name, path.suffix) in FLAGS)
    if not files:
        raise BuildError(f"there are no sources in {sources / name}")
    compiler = find_compiler()
    facts = {
        **environment(portable=bool(level)),
        "compilers": _output([*compiler, "--version"]).partition("\n")[0],
        "sources": source_hash(name, sources),
    }
    torch_folder = _torch_folder()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(facts['C++ ABI'] == 'cxx11')}"
    shared = [f"-std=c++{cxx_standard()}", abi, f"-I{sources}"]
    shared += _system_includes([torch_folder / "include", torch_folder / "include/torch/csrc/api/include"])
    link_flags = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    compilers = {".cpp": [*compiler, *FLAGS[name, ".cpp"], *shared]}
    if level:
        march, features = levels()[level]
        name = f"{name}-{level}"
        facts |= {"level": level, "CPU features": features}
        # Messages must not name the folders of the machine that built the library.
        prefixes = [f"-ffile-prefix-map={sources}=csrc", f"-ffile-prefix-map={torch_folder}=torch"]
        compilers[".cpp"] += [*march, *prefixes]
        link_flags.insert(0, "-lstdc++")  # before PyTorch's libraries, which export parts of it without versions
    elif name == "cpu":
        facts |= {"CPU features": " ".join(_used_features(compiler))}
        compilers[".cpp"] += ["-march=native"]
        link_flags += ["-fopenmp"]
    else:
        toolkit = find_toolkit()
        capabilities = _chosen_architectures(architectures, toolkit)
        facts |= {"compilers": f"{facts['compilers']}, nvcc {toolkit.version}"}
        facts |= {"compute capabilities": " ".join(capabilities), "PTX": capabilities[-1]}
        headers = _system_includes(_cuda_includes(toolkit))
        host = shutil.which(compiler[-1]) or compiler[-1]  # the last word: nvcc does not accept "ccache g++"
        code = ["-ccbin", host, *_code_flags(capabilities)]
        compilers[".cpp"] += headers
        compilers[".cu"] = [toolkit.nvcc, *FLAGS[name, ".cu"], *code, *shared, *headers]
        link_flags += _cuda_link_flags(toolkit)
    if not level:  # a portable library uses PyTorch's own OpenMP, whose file name depends on the release
        link_flags += ["-Wl,-z,defs"]  # undefined symbols are errors now, not when the library is loaded
    return Plan(name, files, compilers, [*compiler, "-shared"], link_flags, facts)


def _system_includes(folders: Iterable[Path]) -> list[str]:
    return [word for folder in folders for word in ("-isystem", str(folder))]  # no warnings from their headers


def _cuda_includes(toolkit: Toolkit) -> list[Path]:
    includes = [] if toolkit.include == Path("/usr/include") else [toolkit.include]
    if not all((toolkit.include / header).exists() for header in MATH_HEADERS):
        major = toolkit.version.split(".")[0]
        includes += _nvidia_packages(f"cu{major}/include") or _nvidia_packages("*/include")
    return includes


def _cuda_link_flags(toolkit: Toolkit) -> list[str]:
    """Flags for PyTorch's CUDA libraries and for the CUDA runtime that PyTorch uses."""
    root, major = toolkit.root, toolkit.version.split(".")[0]
    folders = [*root.glob("lib64"), *root.glob("lib"), *root.glob("targets/*/lib")]
    folders += [*_nvidia_packages(f"cu{major}/lib"), *_nvidia_packages("cuda_runtime/lib")]
    return [*(f"-L{folder}" for folder in folders), "-lc10_cuda", "-ltorch_cuda", f"-l:libcudart.so.{major}"]


def _chosen_architectures(wanted: Sequence[str], toolkit: Toolkit) -> list[str]:
    """Compute capabilities to compile for, lowest first."""
    known = toolkit.architectures()
    wanted = wanted or re.split(r"[\s;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    # "9.0a" and "9.0+PTX" mean 9.0 here: no kernel uses features of a single chip, and PTX is always added.
    chosen = {re.sub(r"([af]?(\+PTX)?)$", "", word) for word in wanted if word}
    for word in chosen - set(known):
        raise BuildError(f"CUDA toolkit {toolkit.version} cannot compile for {word!r}; it knows {', '.join(known)}")
    chosen = chosen or set(known) & _present_architectures() or set(known) & set(ARCHITECTURES)
    if not chosen:
        raise BuildError(f"choose with --arch what CUDA toolkit {toolkit.version} compiles for: {', '.join(known)}")
    return sorted(chosen, key=capability)


def _present_architectures() -> set[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"{}.{}".format(*torch.cuda.get_device_capability(index)) for index in range(count)}


def _code_flags(capabilities: Sequence[str]) -> list[str]:
    """Machine code for each capability, and PTX of the highest, which drivers compile for later GPUs."""
    numbers = [capability.replace(".", "") for capability in capabilities]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def capability(text: str) -> tuple[int, int]:
    """``"9.0"`` as ``(9, 0)``."""
    major, minor = text.split(".")
    return int(major), int(minor)


# --- building ---------------------------------------------------------------------------------------------------------


def build(
    names: Sequence[str] = (),
    architectures: Sequence[str] = (),
    out: Path | None = None,
    sources: Path = SOURCES,
    portable: bool = False,
) -> list[str]:
    """Build libraries and write them, with their JSON files, to ``out``. Prints one line per source file.

    Args:
        names: ``"cpu"``, ``"cuda"``; by default cpu, and cuda if it can be built.
        architectures, sources: see `prepare`.
        out: default `library_folder`.
        portable: build the cpu library at each level of this architecture, in `portable_folder` of ``out``.

    Returns:
        The names of the libraries built.

    Raises:
        BuildError: if a library in ``names`` (by default: cpu) cannot be built, or, after all others have been built
            and installed, if one does not compile.
    """
    start = time.monotonic()
    if architectures and names and "cuda" not in names:
        raise BuildError("only the cuda library is built for architectures of GPUs: leave out --arch")
    if portable:
        if "cuda" in names or architectures:
            raise BuildError("only the cpu library can be portable")
        if not levels():
            raise BuildError(f"portable libraries need {' or '.join(LEVELS)}, but this is {platform.machine()}")
        plans = [prepare("cpu", sources=sources, level=level) for level in levels()]
    else:
        plans = [prepare(name, architectures, sources) for name in names or ("cpu",)]
    if not names and not portable:
        try:
            plans.append(prepare("cuda", architectures, sources))
        except BuildError as obstacle:
            print(f"cuda: not built, {obstacle}", flush=True)
    out = (out or library_folder()).absolute()
    out = portable_folder(out) if portable else out
    built, errors = [], []
    for plan in plans:
        with _folder_inside(out) as folder:
            try:
                _compile(plan, Path(folder))
                _install(plan, Path(folder), out)
                built.append(plan.name)
            except BuildError as error:
                errors.append(str(error))
    if built:
        print(f"built {', '.join(built)} in {time.monotonic() - start:.0f} s: {out}", flush=True)
    if errors:
        raise BuildError("; ".join(errors))
    return built


def _folder_inside(out: Path) -> TemporaryDirectory:
    """A temporary folder inside ``out``, so that moves to ``out`` stay on one file system and are atomic."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_folders(out)
        return TemporaryDirectory(prefix=TEMPORARY, dir=out, ignore_cleanup_errors=True)
    except OSError as error:
        raise BuildError(
            f"cannot write to {out} ({error.strerror}): set the environment variable {FOLDER_VARIABLE} to a writable "
            "folder, both to build and to run"
        ) from error


def _remove_abandoned_folders(out: Path) -> None:
    for folder in out.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):  # its build has just finished
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _compile(plan: Plan, folder: Path) -> None:
    """Compile all sources, in parallel on all processors (at most ``MAX_JOBS``), and link them."""
    jobs = len(os.sched_getaffinity(0))
    if limit := os.environ.get("MAX_JOBS"):
        if not limit.isdecimal() or int(limit) < 1:
            raise BuildError(f"MAX_JOBS must be a positive number, got {limit!r}")
        jobs = min(jobs, int(limit))
    objects = [str(folder / f"{index}.o") for index in range(len(plan.sources))]
    done = itertools.count(1)

    def compile_one(source: Path, target: str) -> None:
        seconds = _run(str(source), [*plan.compilers[source.suffix], "-c", str(source), "-o", target])
        print(f"{plan.name}: [{next(done)}/{len(objects)}] {source.name}  {seconds:.1f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, plan.sources, objects))  # an error cancels what has not started
    library = f"{plan.name}.so"
    _run(library, [*plan.linker, *objects, *plan.link_flags, "-o", str(folder / library)])


def _run(name: str, command: Sequence[str]) -> float:
    """Run a compiler and return the seconds it took. Prints its messages when it has finished."""
    start = time.monotonic()
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.stdout:
        print(result.stdout, file=sys.stderr, flush=True)
    if result.returncode:
        raise BuildError(f"{name} could not be built; see the compiler's messages above")
    return time.monotonic() - start


def _install(plan: Plan, folder: Path, out: Path) -> None:
    """Move a library and its facts to ``out``.

    The old facts are removed first and the new ones are moved last. In between, other processes find a library without
    facts and do not load it. The lock keeps two builds from mixing their files.
    """
    import fcntl  # missing on some systems that import this file but cannot build

    library, facts = f"{plan.name}.so", f"{plan.name}.json"
    recorded = {**plan.facts, "bytes": (folder / library).stat().st_size}
    (folder / facts).write_text(json.dumps(recorded, indent=1) + "\n")
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (out / facts).unlink(missing_ok=True)
        (folder / library).replace(out / library)
        (folder / facts).replace(out / facts)
    finally:
        os.close(lock)
