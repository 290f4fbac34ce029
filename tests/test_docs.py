"""The documentation: its Python runs, its API pages are current, and it knows every error that the software raises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import spatial_mamba
from spatial_mamba import kernels, spatial_mamba_tiny
from spatial_mamba.classification import export, models

from . import api_pages

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "classification" / "guide"
ROOMS = ("classification", "detection", "kernels", "segmentation")
PAGES = (ROOT / "README.md", *sorted(GUIDE.glob("*.md")))


# --- the code in it


def blocks(language: str) -> list[tuple[str, str]]:
    """Name and text of the blocks of a language on all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find in their working folder."""
    folder = tmp_path_factory.mktemp("examples")
    torch.save({"model": spatial_mamba_tiny().state_dict()}, folder / "spatialmamba_tiny.pth")
    Image.new("RGB", (320, 240), (200, 120, 40)).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize(("name", "code"), [pytest.param(*block, id=block[0]) for block in blocks("python")])
def test_python_blocks_run(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "from mmengine" in code:
        pytest.importorskip("mmengine")
    monkeypatch.chdir(folder)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", (*PAGES, *map(ROOT.joinpath, api_pages.pages())), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert targets
    for target, anchor in targets:
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in anchors, f"{target}{anchor}"


def test_api_pages_are_current() -> None:
    assert api_pages.outdated() == []


def test_api_pages_name_what_the_rooms_export() -> None:
    rooms = (
        (spatial_mamba, "classification/models/api"),
        (models, "classification/models/api"),
        (kernels, "kernels/api"),
        (export, "classification/export/api"),
    )
    for package, folder in rooms:
        assert set(package.__all__) <= {page.stem for page in (ROOT / folder).glob("*.md")}


# --- the errors it knows


def template(node: ast.expr) -> str | None:
    """A message with ``...`` for what is filled in; None for an expression that holds no text of its own."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = template(node.left), template(node.right)
        return None if sides == (None, None) else "".join(side or "..." for side in sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{.*?\}", "...", template(node.func.value) or "")
    return None


def python_messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and message of every error: what is raised, what parsers and helpers such as ``require`` are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            node = node.exc
            is_error = isinstance(node, ast.Call)
        else:
            is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".error", "warnings.warn"))
        if is_error and node.args and (message := template(node.args[0])):
            yield node.lineno, message
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":  # of classification/config.py
            key, _, allowed = map(template, node.args)
            yield node.lineno, f"{key or '...'} is ...; it must be {allowed}"
        elif isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "str | None":
            # The reason why something is not possible, for the message of another function.
            returned = [inner for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
            yield from ((inner.lineno, message) for inner in returned if (message := template(inner.value)))


def cpp_messages(text: str) -> Iterator[tuple[int, str]]:
    """Line and message of every check in a C++ source."""
    for match in re.finditer(r"TORCH_CHECK\w*\((.*?)\);", text, flags=re.DOTALL):
        literal = r'"(?:[^"\\]|\\.)*"'
        arguments = re.sub(rf"^.*?, (?={literal})|^[^,]*,[^,]*(?=, {literal})", "", match[1], count=1, flags=re.DOTALL)
        parts = re.split(rf"({literal})", arguments)
        message = "".join(part[1:-1] if part.startswith('"') else "..." if part.strip(", \n") else "" for part in parts)
        yield text.count("\n", 0, match.start()) + 1, message.replace("\\n", " ")


def messages() -> dict[str, str]:
    """Every message of the software, and where it comes from."""
    found: dict[str, str] = {}
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.*")] + list(ROOT.glob("*.py"))
    for path in sorted(sources):
        if path.suffix == ".py":
            told = python_messages(ast.parse(path.read_text(encoding="utf-8")))
        elif path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            told = cpp_messages(path.read_text(encoding="utf-8"))
        else:
            continue
        for line, message in told:
            if re.search("[A-Za-z]{2}", message):
                found.setdefault(normalised(message), f"{path.relative_to(ROOT)}:{line}")
    return found


def normalised(text: str) -> str:
    return " ".join(re.sub(r"\.{3,}", "...", text.replace("\\", "")).split())


def test_every_error_is_in_the_guide() -> None:
    page = normalised((GUIDE / "troubleshooting.md").read_text(encoding="utf-8"))
    known = messages()
    assert len(known) > 200
    missing = [f"{place}: {message}" for message, place in known.items() if message not in page]
    assert not missing, "\n" + "\n".join(missing)


def test_messages_are_found() -> None:
    source = """
raise ValueError(f"a is {a}, " f"not {b!r}")
parser.error("--x: " + reason)
require(f"TRAIN.{key}", True, "at least 0")
raise ValueError("{0} of {1}".format(a, b))
raise error
"""
    assert [message for _, message in sorted(python_messages(ast.parse(source)))] == [
        "a is ..., not ...",
        "--x: ...",
        "TRAIN.... is ...; it must be at least 0",
        "... of ...",
    ]
    check = 'TORCH_CHECK_VALUE(f(a, b) == "c", "x must be ", y, ",\\n got ", z.size(0, 1));'
    assert [normalised(message) for _, message in cpp_messages(check)] == ["x must be ..., got ..."]
