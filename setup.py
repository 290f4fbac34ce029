"""Packaging of the native libraries; everything else is in pyproject.toml.

pip builds in an isolated environment without PyTorch. The wheel is then pure Python, and
``python -m spatial_mamba.kernels build`` adds the libraries later. With ``pip install --no-build-isolation``, libraries
for the installed PyTorch are built and included. ``tests/wheel.py`` sets the environment variable
``SPATIAL_MAMBA_PORTABLE`` to a folder of portable libraries, which are then included instead.
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
    """Build the libraries into the wheel where possible. An editable install uses ``kernels/lib`` instead."""

    def run(self) -> None:
        package = Path(self.build_lib, "spatial_mamba")
        shutil.rmtree(package, ignore_errors=True)  # from an earlier build, perhaps for another PyTorch
        super().run()
        if self.editable_mode:
            return
        (package / "py.typed").touch()  # PEP 561; type checkers would not find it in the repository root
        self.libraries = package / "kernels/lib"
        if portable := os.environ.get("SPATIAL_MAMBA_PORTABLE"):
            shutil.copytree(portable, self.libraries)
            return
        obstacle = self._build()
        if obstacle and os.environ.get("SPATIAL_MAMBA_REQUIRE_NATIVE") == "1":
            raise SystemExit(f"SPATIAL_MAMBA_REQUIRE_NATIVE=1, but native libraries cannot be built: {obstacle}")
        if obstacle:
            print(f"spatial_mamba: installed without native libraries, so it runs slower: {obstacle}")

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """All modules except this file, which is also in the package's root folder."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]

    def _build(self) -> str | None:
        """Build what can be built. Returns None, or the reason why nothing can be built."""
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
    """Tag a wheel that has libraries with its platform, and with any Python 3, since they do not depend on Python."""

    system: str | None = None  # an editable install calls get_tag without run

    def run(self) -> None:
        self.run_command("build_py")
        libraries = list(Path(self.get_finalized_command("build_py").build_lib).rglob("*.so"))
        if libraries:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # otherwise they would be installed as pure Python
            # Portable libraries name the oldest system they run on. These names sort from the oldest to the newest.
            systems = [json.loads(path.with_suffix(".json").read_text()).get("system", "linux") for path in libraries]
            self.system = sysconfig.get_platform().replace("-", "_").replace(".", "_").replace("linux", max(systems))
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", self.system) if self.system else super().get_tag()


class SourceDistribution(sdist):
    """Leave out the tests: setuptools would add some of their files, but not the data that they need."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [name for name in files if not name.startswith("tests/")])


# Keep the metadata out of the root: a Python started there would find the entry points even without an installation.
METADATA = Path(__file__).parent / "build"
METADATA.mkdir(exist_ok=True)
setuptools.setup(
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel, "sdist": SourceDistribution},
    options={"egg_info": {"egg_base": str(METADATA)}},
)
