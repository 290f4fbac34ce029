"""Find, check and load the compiled libraries of this package."""

import json
from pathlib import Path
from typing import Any

import torch

from . import build

BUILD_COMMAND = "python -m spatial_mamba.kernels build"

_loaded: dict[str, dict[str, Any]] = {}  # the facts of each library in use


def load(name: str, folder: Path | None = None, sources: Path = build.SOURCES) -> str | None:
    """Load the library ``"cpu"`` or ``"cuda"``: the one built on this machine, or the portable one from a wheel.

    A library is loaded unless it was built for a different environment (PyTorch, CUDA, CPU), which could crash the
    process, or from different sources.

    Args:
        name: ``"cpu"`` or ``"cuda"``.
        folder: where to look. The default is `build.library_folder`, then the package, for a portable library.
        sources: the folder of the sources that it must have been built from.

    Returns:
        None, or one line that says why the library is not loaded and how to fix it.
    """
    if name == "cuda" and torch.version.cuda is None:
        return "PyTorch is built without CUDA here (builds with CUDA: https://pytorch.org/get-started)"
    reasons = []
    for where in folders(name, folder):
        facts = read_facts(name, where)
        try:
            reason = _mismatch(name, where / f"{name}.so", facts, sources)
            if reason is None:
                torch.ops.load_library(where / f"{name}.so")
                _loaded[name] = facts
                return None
        except Exception as error:  # whatever is wrong with the library, the package works without it
            reason = f"cannot be loaded ({' '.join(str(error).split())})"
        reasons.append(reason)
    return f"{reasons[0] if reasons else 'not built'}: {BUILD_COMMAND} {name}"


def folders(name: str, folder: Path | None = None) -> list[Path]:
    """Folders that contain a library of this name for the installed PyTorch, the preferred one first."""
    native, packaged = folder or build.library_folder(), folder or build.PACKAGE / "lib"
    return [where for where in (native, build.portable_folder(packaged)) if (where / f"{name}.so").exists()]


def loaded(name: str) -> dict[str, Any]:
    """The facts of a loaded library; empty if it is not loaded."""
    return _loaded.get(name, {})


def read_facts(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The facts of a library, how it was built, from its JSON file; empty if the file is missing or broken."""
    try:
        facts = json.loads(((folder or build.library_folder()) / f"{name}.json").read_text())
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


def _mismatch(name: str, library: Path, facts: dict[str, Any], sources: Path) -> str | None:
    if not facts:
        return f"{name}.json, which records what {library} was built for, is missing or broken"
    for key, here in build.environment(portable="portable" in facts).items():
        if facts.get(key) != here:
            return f"built for {key} {facts.get(key) or 'unknown'}, but this is {here}"
    if lacking := set(facts.get("CPU features", "").split()) - build.cpu_features():
        return f"built for a processor with {', '.join(sorted(lacking)[:6])}, which this one lacks"
    if facts.get("sources") != build.source_hash(name, sources):
        return "built from different sources"
    if facts.get("bytes") != library.stat().st_size:
        return f"{library} is damaged: its size has changed since it was built"
    return None
