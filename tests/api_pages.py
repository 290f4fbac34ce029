"""Writes the API pages from the docstrings: ``python tests/api_pages.py``; ``--check`` fails if one is not current.

The sources are read and not imported, so that no optional package is needed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import griffe

ROOT = Path(__file__).parents[1]
LINE = 100  # longest signature that stays on one line
HUB = "https://huggingface.co/docs/huggingface_hub/package_reference/mixins"
BLANK = "\n\n"
SIGILS = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}


class Room(NamedTuple):
    """A folder of pages: where it lies, what it is about, and the public names by module and file."""

    folder: str
    title: str
    names: tuple[tuple[str, str, tuple[str, ...]], ...]


VARIANTS = ("spatial_mamba_tiny", "spatial_mamba_small", "spatial_mamba_base")
MODEL_ROOM, MODELS = "spatial_mamba.classification.models", "classification/models"
EXPORT_ROOM, EXPORT = "spatial_mamba.classification.export", "classification/export"
OPERATORS = (
    "selective_scan", "state_fusion", "structure_aware_scan", "depthwise_conv", "gated_norm", "spatial_mixer",
)  # fmt: skip
ROOMS = (
    Room(
        "classification/models/api",
        "Models",
        (
            ("spatial_mamba", f"{MODELS}/spatial_mamba.py", ("SpatialMamba", "SpatialMambaBackbone", *VARIANTS)),
            (MODEL_ROOM, f"{MODELS}/trained.py", ("load_classifier", "TrainedClassifier")),
            (MODEL_ROOM, f"{MODELS}/weights.py", ("WeightsError",)),
        ),
    ),
    Room(
        "kernels/api",
        "Operators",
        (
            *(("spatial_mamba.kernels", f"kernels/{name}.py", (name,)) for name in OPERATORS),
            ("spatial_mamba.kernels", "kernels/backends.py", ("use_backend",)),
        ),
    ),
    Room(
        "detection/api",
        "OpenMMLab",
        (("spatial_mamba.detection", "detection/openmmlab/backbone.py", ("MMSpatialMamba",)),),
    ),
    Room(
        "classification/export/api",
        "Export",
        (
            (EXPORT_ROOM, f"{EXPORT}/onnx_file.py", ("export_onnx",)),
            (EXPORT_ROOM, f"{EXPORT}/programs.py", ("export_program", "export_aoti")),
        ),
    ),
)
REGISTERED = {"MMSpatialMamba": "MM_SpatialMamba"}  # names by which configs find a class


Sources = dict[str, griffe.Object]  # what the files of all pages define, by name


def pages() -> dict[Path, str]:
    """The text of every page, by its path from the root."""
    sources = {
        name: member
        for file in dict.fromkeys(file for room in ROOMS for _, file, _ in room.names)
        for name, member in _read(file).members.items()
        if not member.is_alias
    }
    written = {}
    for room in ROOMS:
        index = [f"# {room.title}: API", "", "Written from the docstrings by `python tests/api_pages.py`.", ""]
        for module, file, names in room.names:
            for name in names:
                title = REGISTERED.get(name, name)
                page = Path(room.folder, f"{title}.md")
                source = f"[{file}]({os.path.relpath(file, room.folder)})"
                head = [f"# {title}", "", f"[All names](README.md) · source: {source}", ""]
                written[page] = "\n".join([*head, *_page(sources[name], title, module, sources)]).rstrip() + "\n"
                index.append(f"- [`{title}`]({page.name}): {_one_line(sources[name].docstring.value.split(BLANK)[0])}")
        written[Path(room.folder, "README.md")] = "\n".join(index) + "\n"
    return written


def outdated() -> list[str]:
    """One line for every page that is missing, not what the docstrings say, or of no public name."""
    expected = pages()
    found = {path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room.folder).glob("*.md")}
    wrong = [f"{path}: is of no public name" for path in sorted(found - expected.keys())]
    for path, text in expected.items():
        if path not in found:
            wrong.append(f"{path}: is missing")
        elif (ROOT / path).read_text(encoding="utf-8") != text:
            wrong.append(f"{path}: is not what the docstrings say")
    return wrong


def _read(file: str) -> griffe.Module:
    path = ROOT / file
    return griffe.visit(path.stem, path, path.read_text(encoding="utf-8"), docstring_parser="google")


def _page(shown: griffe.Object, title: str, module: str, sources: Sources) -> Iterator[str]:
    registered = f'# in a config: custom_imports = dict(imports=["{module}"]), type="{title}"'
    yield from ("```python", f"from {module} import {title}" if title == shown.name else registered, "```", "")
    lineage = _lineage(shown, sources) if shown.is_class else [shown]
    yield from _described(title, lineage, sources)
    methods: dict[str, griffe.Function] = {}
    for owner in lineage if shown.is_class else ():
        for name, member in owner.members.items():
            if member.is_function and member.docstring and not name.startswith("_"):
                methods.setdefault(name, member)
    if not methods:
        return
    yield from ("## Methods", "")
    for name in sorted(methods):
        yield from (f"### {name}", "", *_described(name, [methods[name]], sources))
    if any(str(base) == "HubMixin" for owner in lineage for base in owner.bases):
        yield f"`from_pretrained`, `push_to_hub`, `save_pretrained`: [huggingface_hub]({HUB})'s, loading strictly."


def _described(title: str, lineage: Sequence[griffe.Object], sources: Sources) -> Iterator[str]:
    """Signature, text, arguments, results and errors of a function, or of a class and its base classes."""
    shown = lineage[0]
    parameters = _parameters(lineage, sources)
    arguments = [
        f"{name}{f': {kind}' if kind else ''}{f' = {default}' if default else ''}" for name, kind, default in parameters
    ]
    result = f" -> {shown.returns}" if shown.is_function and shown.returns is not None else ""
    signature = f"{title}({', '.join(arguments)}){result}"
    if len(signature) > LINE:
        signature = "\n".join((f"{title}(", *(f"    {argument}," for argument in arguments), f"){result}"))
    if arguments or shown.is_function:
        yield from ("```python", signature, "```", "")

    for section in _sections(lineage[:1], "text"):
        yield from (section, "")
    described = _descriptions(lineage)
    if any(name in described for name, _, _ in parameters):
        yield from ("**Arguments**", "")
        for name, kind, default in parameters:
            if name in described:
                about = ", ".join([f"`{kind}`"] + ([f"default `{default}`"] if default else []))
                yield f"- `{name}` ({about}): {described[name]}"
        yield ""
    for kind in ("attributes", "returns", "yields", "raises"):
        entries = [entry for section in _sections(lineage, kind) for entry in section]
        if entries:
            yield from (f"**{kind.capitalize()}**", "")
            yield from (f"- {_label(entry)}: {_one_line(entry.description)}" for entry in entries)
            yield ""


def _sections(lineage: Sequence[griffe.Object], kind: str) -> list[Any]:
    """What the docstrings of a function, or of a class and its base classes, have under a heading."""
    docstrings = [owner.docstring for owner in lineage if owner.docstring]
    parsed = [section for docstring in docstrings for section in docstring.parse(warnings=False)]
    return [section.value for section in parsed if section.kind.value == kind]


def _label(entry: Any) -> str:
    name = getattr(entry, "name", "")
    return f"`{name}` (`{entry.annotation}`)" if name else f"`{entry.annotation}`"


def _lineage(shown: griffe.Class, sources: Sources) -> list[griffe.Class]:
    """The class, and those of its base classes that the same files define."""
    bases = [sources[base] for base in map(str, shown.bases) if base in sources]
    return [shown, *(owner for base in bases for owner in _lineage(base, sources))]


def _parameters(lineage: Sequence[griffe.Object], sources: Sources) -> list[tuple[str, str, str]]:
    """Name, type and default of each; a bare ``*`` stands in front of those that are taken by keyword alone.

    Options that a constructor passes on are those of the base class.
    """
    index = next((i for i, o in enumerate(lineage) if o.is_function or "__init__" in o.members), None)
    if index is None:  # of a data class they are the attributes
        fields = [member for member in lineage[0].members.values() if member.is_attribute]
        return [(field.name, str(field.annotation), str(field.value or "")) for field in fields]
    found = []
    for parameter in lineage[index].parameters:
        kind, default = parameter.kind, str(parameter.default or "")
        if parameter.name in ("self", "cls"):
            continue
        if kind is griffe.ParameterKind.keyword_only and not any(name.startswith("*") for name, _, _ in found):
            found.append(("*", "", ""))
        if kind is griffe.ParameterKind.var_keyword and (bases := lineage[index + 1 :]):
            names = {name for name, _, _ in found}
            found += [entry for entry in _parameters(bases, sources) if entry[0] not in names]
            continue
        sigil, annotation = SIGILS.get(kind, ""), str(parameter.annotation or "")
        # In place of the names of constants and of types their values.
        annotation, default = (
            str(sources[text].value) if text in sources and sources[text].is_attribute else text
            for text in (annotation, default)
        )
        found.append((f"{sigil}{parameter.name}", annotation, "" if sigil else default))
    return found


def _descriptions(lineage: Sequence[griffe.Object]) -> dict[str, str]:
    """What is said of each argument, by the class itself or the nearest base class that says it."""
    described: dict[str, str] = {}
    for section in _sections(lineage, "parameters"):
        for entry in section:
            text = _one_line(entry.description)
            if len(lineage) == 1 or not text.startswith("see ``"):
                described |= {name: text for name in entry.name.split(", ") if name not in described}
    return described


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args(argv).check:
        wrong = outdated()
        print("\n".join([*wrong, "run: python tests/api_pages.py"] if wrong else ["all API pages are current"]))
        return 1 if wrong else 0
    for path, text in pages().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
