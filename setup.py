"""Packaging of the native libraries; everything else is in pyproject.toml.

pip builds in an isolated environment, without PyTorch: the package is then pure Python, and
``python -m spatial_mamba.kernels build`` adds the libraries. ``pip install --no-build-isolation`` sees the installed
PyTorch and packs libraries for it. The variable ``SPATIAL_MAMBA_PORTABLE`` names a folder of portable libraries to pack
instead, which ``kernels/wheel.py`` makes.
"""

import importlib.util
import json
import os
import shutil
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit("--no-build-isolation needs a newer setuptools: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel  # after the check: older releases lack it


class BuildWithLibraries(build_py):
    """Build the libraries into the wheel, where that is possible; an editable install has ``kernels/lib`` for that."""

    def run(self) -> None:
        package = Path(self.build_lib, "spatial_mamba")
        shutil.rmtree(package, ignore_errors=True)  # of an earlier build, perhaps for another PyTorch
        super().run()
        if self.editable_mode:
            return
        (package / "py.typed").touch()  # PEP 561; in the tree it would lie at the top, where type checkers never look
        self.libraries = package / "kernels/lib"
        if portable := os.environ.get("SPATIAL_MAMBA_PORTABLE"):
            shutil.copytree(portable, self.libraries)
            return
        obstacle = self._build()
        if obstacle and os.environ.get("SPATIAL_MAMBA_REQUIRE_NATIVE") == "1":
            raise SystemExit(f"SPATIAL_MAMBA_REQUIRE_NATIVE=1, but native libraries cannot be built: {obstacle}")
        if obstacle:
            print(f"spatial_mamba: native libraries are missing, which only make it faster: {obstacle}")

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """All modules but this file, which lies in the root of the package too."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]

    def _build(self) -> str | None:
        """Build what can be built; None, or the reason why that is nothing."""
        if importlib.util.find_spec("torch") is None:
            return "no PyTorch to build for (pip hides it unless called with --no-build-isolation)"
        spec = importlib.util.spec_from_file_location("kernels_build", Path(__file__).parent / "kernels/build.py")
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.build(out=self.libraries)
        except build.BuildError as error:
            return str(error)
        return None


class PlatformWheel(bdist_wheel):
    """Name the platform in a wheel with libraries; the Python version stays open, for they know nothing of it."""

    system: str | None = None  # an editable install asks for the tag without a run

    def run(self) -> None:
        self.run_command("build_py")
        libraries = list(Path(self.get_finalized_command("build_py").build_lib).rglob("*.so"))
        if libraries:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # or the files would be installed as pure Python
            # Portable ones state the oldest system that they run on; the names of systems are in their order.
            systems = [json.loads(path.with_suffix(".json").read_text()).get("system", "linux") for path in libraries]
            self.system = sysconfig.get_platform().replace("-", "_").replace(".", "_").replace("linux", max(systems))
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", self.system) if self.system else super().get_tag()


class SourceDistribution(sdist):
    """Without tests: setuptools would add some of their files, not those that they need."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [name for name in files if not name.startswith("tests/")])


# Not in the root: every Python that is started there would find the entry points in it, installed or not.
METADATA = Path(__file__).parent / "build"
METADATA.mkdir(exist_ok=True)
setuptools.setup(
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel, "sdist": SourceDistribution},
    options={"egg_info": {"egg_base": str(METADATA)}},
)
