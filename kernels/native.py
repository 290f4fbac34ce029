"""Find, check and load the compiled libraries of this package."""

import json
from pathlib import Path
from typing import Any

import torch

from . import build

BUILD_COMMAND = "python -m spatial_mamba.kernels build"

_loaded: dict[str, dict[str, Any]] = {}  # the facts of each library in use


def load(name: str, folder: Path | None = None, sources: Path = build.SOURCES) -> str | None:
    """Load the library ``"cpu"`` or ``"cuda"``: the one built on this machine, else the portable one of a wheel.

    One that was built for a different environment (PyTorch, CUDA, CPU) is not loaded: it could crash the process.

    Args:
        name: of the library.
        folder: where both lie; default `build.library_folder` and the package.
        sources: what it has to be made of.

    Returns:
        None, or the reason why it is not loaded and what helps, in one line.
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
        except Exception as error:  # whatever is wrong with a library: the package works without
            reason = f"cannot be loaded ({' '.join(str(error).split())})"
        reasons.append(reason)
    return f"{reasons[0] if reasons else 'not built'}: {BUILD_COMMAND} {name}"


def folders(name: str, folder: Path | None = None) -> list[Path]:
    """Folders that hold a library of this name for the installed PyTorch, the preferred one first."""
    built, packed = folder or build.library_folder(), folder or build.PACKAGE / "lib"
    return [where for where in (built, build.portable_folder(packed)) if (where / f"{name}.so").exists()]


def loaded(name: str) -> dict[str, Any]:
    """The facts of a library in use; empty if it is not loaded."""
    return _loaded.get(name, {})


def read_facts(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What a library was built for, by and from, as its JSON file tells; empty if that is missing or broken."""
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
    ptx = [build.capability(facts["PTX"])] if "PTX" in facts else []
    return any(major == capability[0] and minor <= capability[1] for major, minor in compiled) or any(
        version <= capability for version in ptx
    )


def _mismatch(name: str, library: Path, facts: dict[str, Any], sources: Path) -> str | None:
    if not facts:
        return f"{library} is without {name}.json, which tells what it was built for, or that is broken"
    for key, here in build.environment(portable="portable" in facts).items():
        if facts.get(key) != here:
            return f"built for {key} {facts.get(key) or 'unknown'}, but this is {here}"
    lacking = set(facts.get("CPU features", "").split()) - build.cpu_features()
    if lacking:
        return f"built for a processor with {', '.join(sorted(lacking)[:6])}, which this one lacks"
    if facts.get("sources") != build.source_hash(name, sources):
        return "built from other sources than these"
    if facts.get("bytes") != library.stat().st_size:
        return f"{library} is damaged: its size is not the one that was built"
    return None
