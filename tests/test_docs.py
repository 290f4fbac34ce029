"""The documentation: its Python code runs, and its commands and link targets exist."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from spatial_mamba import spatial_mamba_tiny
from spatial_mamba.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "classification", "detection", "kernels", "segmentation")
PAGES = (
    ROOT / "README.md",
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")) if page.parent.name != "docs"),
)
PACKAGES = {  # imported by examples -> imported here, or the example is skipped
    "mmengine": "mmengine",
    "onnxruntime": "onnxscript",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Names and text of the code blocks in a language, from all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


def cases(language: str) -> pytest.MarkDecorator:
    """The blocks as test parameters; those that write ONNX files are slow."""
    parameters = [
        pytest.param(name, code, id=name, marks=[pytest.mark.slow] if "export_onnx" in code else [])
        for name, code in blocks(language)
    ]
    return pytest.mark.parametrize(("name", "code"), parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the examples, with the files that they read."""
    folder = tmp_path_factory.mktemp("examples")
    torch.save({"model": spatial_mamba_tiny().state_dict()}, folder / "spatialmamba_tiny.pth")
    Image.new("RGB", (320, 240), (200, 120, 40)).save(folder / "photo.jpg")
    return folder


@cases("python")
def test_python_blocks_run(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, needed in PACKAGES.items():
        if module in code:
            pytest.importorskip(needed)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@cases("sh")
def test_commands_exist(name: str, code: str) -> None:
    for words in re.findall(r"(?:spatial-mamba|-m spatial_mamba) ([a-z-]+ ?[a-z-]*)", code):
        assert any(f"{words} ".startswith(f"{command} ") for command in COMMANDS), words
    for module in re.findall(r"-m spatial_mamba\.([\w.]+)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in anchors, f"{target}{anchor}"
