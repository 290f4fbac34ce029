"""Wheels and source distributions: contents, installation, and building without PyTorch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_mamba.kernels import build

from . import wheel as releases
from .kernels.test_build import SUPPORTED, needs_compiler, needs_level, write_sources

setuptools = pytest.importorskip("setuptools", minversion="77")
read_configuration = pytest.importorskip("setuptools.config.pyprojecttoml").read_configuration
ROOT = Path(__file__).parents[1]
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "dist", "data", "output", "work_dirs", "lib", "*.so")


def packs(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the wheel: it is slow, and runs in the same process as the others, which share the wheel."""
    return pytest.mark.slow(pytest.mark.xdist_group("packaging")(test))


def copy_tree(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))


def make(kind: str, tree: Path, out: Path, packages: Path) -> Path:
    """Call setuptools' build hook in an environment with only setuptools."""
    script = f"import setuptools.build_meta as hooks; hooks.build_{kind}({str(out)!r})"
    command = [sys.executable, "-S", "-W", "error", "-c", script]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A copy of the tree, its sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "empty").mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack", f"setuptools-{setuptools.__version__}.dist-info"):
        (folder / "empty" / name).symlink_to(installed / name)
    tree = copy_tree(folder)
    source = make("sdist", tree, folder / "source", folder / "empty")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    return tree, source, make("wheel", unpacked, folder / "wheel", folder / "empty")


def install(wheel: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True)


def run(folder: Path, script: str, **variables: str) -> list[str]:
    """Run a script that imports the package from ``folder``, and return the lines that it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPATIAL_MAMBA")}
    environment |= {"PYTHONPATH": str(folder), **variables}
    command = [sys.executable, "-c", script]
    return subprocess.check_output(command, cwd=folder, env=environment, text=True).splitlines()


@packs
def test_both_hold_code_configs_and_sources_but_nothing_built(made: tuple[Path, Path, Path]) -> None:
    tree, source, wheel = made
    packed = {path for path in tree.rglob("*.py") if path.relative_to(tree).parts[0] != "tests"}
    packed -= {tree / "setup.py", *tree.glob("*/tools/*")}
    packed |= {path for path in tree.glob("configs/**/*.*") if path.is_file()}
    packed |= {path for path in tree.glob("kernels/csrc/**/*.*") if path.is_file()}
    expected = {path.relative_to(tree).as_posix() for path in packed}
    assert len(expected) > 100
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")]
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    paths = {name.replace("spatial_mamba_mmcv/", "spatial_mamba/detection/mmcv_operators/") for name in names}
    assert {path.removeprefix("spatial_mamba/") for path in paths} == {*expected, "py.typed"}
    assert licenses
    with tarfile.open(source) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    others = {name for name in members if not name.startswith("spatial_mamba.egg-info/")} - expected
    assert others == {"LICENSE", "README.md", "pyproject.toml", "setup.py", "setup.cfg", "PKG-INFO"}


@packs
def test_the_wheel_installs_reads_its_configs_and_gives_help(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert made[2].name.endswith("-py3-none-any.whl")
    install(made[2], tmp_path)
    script = (
        "import importlib.resources, runpy, sys, spatial_mamba\n"
        "from spatial_mamba.classification.config import load_config\n"
        "print(spatial_mamba.__file__)\n"
        "print(importlib.resources.files('spatial_mamba').joinpath('py.typed').is_file())\n"
        "print(load_config('spatialmamba_tiny')[0].MODEL.NAME)\n"
        "sys.argv[1:] = ['--help']\n"
        "runpy.run_module('spatial_mamba', run_name='__main__')\n"
    )
    file, is_typed, name, usage, *_ = run(tmp_path, script)
    assert (file, is_typed, name) == (str(tmp_path / "spatial_mamba/__init__.py"), "True", "spatialmamba_tiny")
    assert usage.startswith("usage: ")


def test_every_package_of_the_tree_is_listed() -> None:
    settings = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    names = {folder.replace("/", "."): name for name, folder in settings["package-dir"].items()}
    found = {names.get(name, f"spatial_mamba.{name}") for name in setuptools.find_packages(ROOT)}
    assert set(settings["packages"]) == {"spatial_mamba", *found}


@needs_compiler
@needs_level
def test_a_releases_wheel_brings_libraries_for_each_pytorch(tmp_path: Path) -> None:
    """With one interpreter and tiny sources."""
    tree = copy_tree(tmp_path)
    shutil.rmtree(tree / "kernels/csrc")
    write_sources(tree / "kernels/csrc")
    command = [sys.executable, tree / "tests/wheel.py", "--out", tmp_path / "dist", sys.executable]
    variables = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}  # pip reads 0 as no isolation
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.search(rf"-py3-none-manylinux_2_\d+_{build.platform.machine()}\.whl$", wheel.name)
    folder = build.portable_folder(Path("spatial_mamba/kernels/lib")).as_posix()
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "/lib/" in name]
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
    expected = {f"{folder}/cpu-{level}.{suffix}" for level in build.levels() for suffix in ("json", "so")}
    assert set(libraries) == expected
    assert "Root-Is-Purelib: false" in metadata
    install(wheel, tmp_path / "installed")
    script = "from spatial_mamba.kernels import native; print(native.loaded('cpu')['level'])"
    assert run(tmp_path / "installed", script) == [SUPPORTED[0]]


def test_the_tag_of_a_wheel_is_that_of_the_oldest_system(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = "Name: GLIBC_2.2.5  Name: GCC_3.0  Name: GLIBC_2.14  Name: GLIBCXX_3.4.21  Name: CXXABI_1.3.{}"

    def tag(shown: str) -> str:
        monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, shown))
        return releases.oldest_system(Path("cpu-x86-64-v3.so"))

    for newest, system in ((9, "manylinux_2_28"), (11, "manylinux_2_28"), (13, "manylinux_2_34")):
        assert tag(needs.format(newest)) == system
    with pytest.raises(SystemExit, match=r"cpu-x86-64-v3\.so runs on none of manylinux_2_28, .*: build it on an older"):
        tag("Name: GLIBC_2.99")


@packs
def test_building_leaves_no_entry_points_in_the_root(made: tuple[Path, Path, Path]) -> None:
    """A Python started there without this package would find them, and PyTorch would fail to load them."""
    assert list(made[0].glob("*.egg-info")) == []
