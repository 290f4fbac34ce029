"""Packaging of the native libraries; everything else is in pyproject.toml.

pip builds in an isolated environment, without PyTorch: the package is then pure Python, and
``python -m spatial_mamba.kernels build`` adds the libraries. ``pip install --no-build-isolation`` sees the installed
PyTorch and packs libraries for it.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit("--no-build-isolation needs a newer setuptools: pip install 'setuptools>=70.1'") from None


class BuildWithLibraries(build_py):
    """Build the libraries into the wheel, where that is possible; an editable install has ``kernels/lib`` for that."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        self.libraries = Path(self.build_lib, "spatial_mamba/kernels/lib")
        shutil.rmtree(self.libraries, ignore_errors=True)  # of an earlier build, perhaps for another PyTorch
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
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.build(out=self.libraries)
        except build.BuildError as error:
            return str(error)
        return None


class PlatformWheel(bdist_wheel):
    """Name the platform in a wheel with libraries; the Python version stays open, for they know nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        if any(Path(self.get_finalized_command("build_py").build_lib).rglob("*.so")):
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, system


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
