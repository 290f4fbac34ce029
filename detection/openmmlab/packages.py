"""Check OpenMMLab's packages before they are used, and report each problem in one line with the command to fix it."""

import importlib
import importlib.metadata
from importlib.util import find_spec

from packaging.version import Version

import spatial_mamba_mmcv

from ...kernels.errors import UserError

# Distribution -> (module, first supported version, first unsupported version, version to install).
_PACKAGES = {
    "mmengine": ("mmengine", "0.10.0", "1.0.0", "0.10.7"),
    "mmcv-lite": ("mmcv", "2.0.0", "2.2.0", spatial_mamba_mmcv.VERSION),
    "mmdet": ("mmdet", "3.3.0", "4.0.0", "3.3.0"),
    "mmsegmentation": ("mmseg", "1.2.2", "2.0.0", "1.2.2"),
    "ftfy": ("ftfy", "6", "7", "6.3.1"),
    "regex": ("regex", "2022", "3000", "2026.9.29"),
}
# mmseg imports the last two but does not declare them as dependencies.
_NEEDED_BY = {
    "mmdet": ("mmengine", "mmcv-lite", "mmdet"),
    "mmseg": ("mmengine", "mmcv-lite", "mmsegmentation", "ftfy", "regex"),
}
# Modules that may be installed but broken -> the command that fixes them.
_IMPORTED = {
    "cv2": "pip uninstall -y opencv-python && pip install opencv-python-headless",
    "torchvision": "install the torchvision that matches this PyTorch, https://pytorch.org/get-started",
    spatial_mamba_mmcv.MODULE: (  # if compiled for another PyTorch
        f"pip uninstall -y mmcv && pip install --force-reinstall --no-deps mmcv-lite=={spatial_mamba_mmcv.VERSION}"
    ),
}
_COMPILED = {"mmcv-lite": "mmcv"}  # distribution -> an accepted replacement


def check_packages(package: str) -> None:
    """Check that ``mmdet`` or ``mmseg`` can be imported with everything it needs, including mmcv's operators.

    Raises:
        UserError: naming the packages that are missing, or the first that is unsupported, and the command that installs
            them.
    """
    versions = {name: _installed(name) for name in _NEEDED_BY[package]}
    missing = [name for name, version in versions.items() if not version]
    if missing:
        wanted = " ".join(f"{name}=={_PACKAGES[name][3]}" for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{', '.join(missing)}, which this command needs, {verb} missing: pip install {wanted}")
    for distribution, version in versions.items():
        module, first, beyond, wanted = _PACKAGES[distribution]
        install = f"pip install {distribution}=={wanted}"
        if version is None or find_spec(module) is None:
            install += " --force-reinstall --no-deps"  # removing another package deleted its files
            raise UserError(f"{distribution}, which this command needs, is missing: {install}")
        if not Version(first) <= Version(version) < Version(beyond):
            raise UserError(f"{module} {version} is unsupported; it must be >= {first} and < {beyond}: {install}")
    if find_spec("pkg_resources") is None:
        raise UserError("mmengine imports pkg_resources, which setuptools 82 removed: pip install 'setuptools<82'")
    for module, remedy in _IMPORTED.items():
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another PyTorch
            raise UserError(f"{module} cannot be imported ({error}): {remedy}") from None


def _installed(distribution: str) -> str | None:
    """The version of a distribution or of its accepted replacement; None if neither is installed."""
    return _version(_COMPILED.get(distribution, distribution)) or _version(distribution)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
