"""Find, check and load the compiled libraries of this package; find Triton."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from . import build

BUILD_COMMAND = "python -m spatial_mamba.kernels build"
LEVEL_VARIABLE = "SPATIAL_MAMBA_CPU_LEVEL"

_loaded: dict[str, dict[str, Any]] = {}  # the facts of each library in use


def load(name: str, folder: Path | None = None, sources: Path = build.SOURCES) -> str | None:
    """Load the library ``"cpu"`` or ``"cuda"``: the one built for this machine, else the highest usable portable level.

    A library is loaded unless it was built for a different environment (PyTorch, CUDA, CPU), which could crash the
    process, or from different sources.

    Args:
        name: ``"cpu"`` or ``"cuda"``.
        folder: where to look. The default is `build.library_folder`, then the package, for portable libraries.
        sources: the folder of the sources that it must have been built from.

    Returns:
        None, or one line that says why the library is not loaded and how to fix it.

    Raises:
        ImportError: if ``SPATIAL_MAMBA_CPU_LEVEL`` names a level that does not exist or cannot be loaded.
    """
    if name == "cuda" and torch.version.cuda is None:
        return "PyTorch is built without CUDA here (builds with CUDA: https://pytorch.org/get-started)"
    level = _forced_level() if name == "cpu" else None
    reason = "not built"
    for library in libraries(name, folder):
        if level and library.stem != f"{name}-{level}":
            continue
        facts = read_facts(library)
        try:
            mismatch = _mismatch(name, library, facts, sources)
            if mismatch is None:
                torch.ops.load_library(library)
                _loaded[name] = facts
                return None
            reason = mismatch
        except Exception as error:  # whatever is wrong with the library, the package works without it
            reason = f"cannot be loaded ({' '.join(str(error).split())})"
    if level:
        raise ImportError(
            f"{LEVEL_VARIABLE}={level} cannot be used: {reason}. Unset it; {BUILD_COMMAND} --portable builds all levels"
        )
    return f"{reason}: {BUILD_COMMAND} {name}"


def _forced_level() -> str | None:
    level = os.environ.get(LEVEL_VARIABLE) or None
    if level is not None and level not in build.levels():
        raise ImportError(f"{LEVEL_VARIABLE} must be one of {', '.join(build.levels()) or 'none here'}, got {level!r}")
    return level


def libraries(name: str, folder: Path | None = None) -> list[Path]:
    """The existing libraries of this name for the installed PyTorch, the preferred one first."""
    folders = [folder] if folder else list(dict.fromkeys([build.library_folder(), build.PACKAGE / "lib"]))
    files = [folders[0] / f"{name}.so"]
    files += [build.portable_folder(where) / f"{name}-{level}.so" for where in folders for level in build.levels()]
    return [file for file in files if file.exists()]


def loaded(name: str) -> dict[str, Any]:
    """The facts of a loaded library; empty if it is not loaded."""
    return _loaded.get(name, {})


def read_facts(library: Path) -> dict[str, Any]:
    """The facts of a library, how it was built, from its JSON file; empty if the file is missing or broken."""
    try:
        facts = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def kernels_for(capability: tuple[int, int]) -> bool:
    """Whether the cuda library, if loaded, has code for a GPU of this compute capability.

    Machine code runs on later GPUs of the same generation, PTX on all later ones.
    """
    facts = loaded("cuda")
    compiled = [build.capability(text) for text in facts.get("compute capabilities", "").split()]
    if any(major == capability[0] and minor <= capability[1] for major, minor in compiled):
        return True
    return "PTX" in facts and build.capability(facts["PTX"]) <= capability


def triton_version() -> str | None:
    """The version of Triton, from its source, since importing it takes most of a second; None if it is missing."""
    spec = importlib.util.find_spec("triton")
    if not spec or not spec.origin:  # find_spec also finds a plain folder of that name
        return None
    stated = re.search(r"^__version__ = ['\"](.+)['\"]", Path(spec.origin).read_text(), re.MULTILINE)
    return stated[1] if stated else "unknown"


def _mismatch(name: str, library: Path, facts: dict[str, Any], sources: Path) -> str | None:
    if not facts:
        return f"{library.stem}.json, which records what {library} was built for, is missing or broken"
    for key, here in build.environment(portable="level" in facts).items():
        if facts.get(key) != here:
            return f"built for {key} {facts.get(key) or 'unknown'}, but this is {here}"
    if lacking := set(facts.get("CPU features", "").split()) - build.cpu_features():
        return f"built for a processor with {', '.join(sorted(lacking)[:6])}, which this one lacks"
    if facts.get("sources") != build.source_hash(name, sources):
        return "built from different sources"
    if facts.get("bytes") != library.stat().st_size:
        return f"{library} is damaged: its size has changed since it was built"
    return None
