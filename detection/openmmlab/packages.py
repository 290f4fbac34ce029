"""Checks OpenMMLab's packages before they are used: each fault in one line, with the command that mends it."""

import importlib
import importlib.metadata
from importlib.util import find_spec

from packaging.version import Version

# Distribution -> (module, first version that fits, first that does not fit any more, version to install).
_PACKAGES = {
    "mmengine": ("mmengine", "0.10.0", "1.0.0", "0.10.7"),
    "mmcv": ("mmcv", "2.0.0", "2.2.0", "2.1.0"),
    "mmdet": ("mmdet", "3.3.0", "4.0.0", "3.3.0"),
    "mmsegmentation": ("mmseg", "1.2.2", "2.0.0", "1.2.2"),
    "ftfy": ("ftfy", "6", "7", "6.3.1"),
    "regex": ("regex", "2022", "3000", "2026.11.15"),
}
# mmseg imports the last two without asking pip for them.
_NEEDED_BY = {"mmdet": ("mmengine", "mmcv", "mmdet"), "mmseg": ("mmengine", "mmcv", "mmsegmentation", "ftfy", "regex")}
# mmcv compiles for the PyTorch it sees, which it does only outside pip's isolated environment.
_BUILD_MMCV = (
    "pip install 'setuptools<82' wheel ninja psutil && "
    f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps mmcv=={_PACKAGES['mmcv'][3]}"
)


class SetupError(ValueError):
    """A package, config or option cannot be used; the one-line message names it and the remedy."""


def check_packages(package: str) -> None:
    """Make sure that ``mmdet`` or ``mmseg`` can be imported with all it needs, mmcv's operators among that.

    Raises:
        SetupError: naming the first package that is missing or does not fit, and the command that installs it.
    """
    for distribution in _NEEDED_BY[package]:
        module, first, beyond, wanted = _PACKAGES[distribution]
        install = _BUILD_MMCV if distribution == "mmcv" else f"pip install {distribution}=={wanted}"
        if find_spec(module) is None:
            raise SetupError(f"{distribution}, which this command needs, is missing: {install}")
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # mmcv-lite, which has the module and no operators
            raise SetupError(f"{module} was not installed by the package {distribution}: {install}") from None
        if not Version(first) <= Version(version) < Version(beyond):
            raise SetupError(f"{distribution} {version} does not fit, {first} <= version < {beyond} does: {install}")
    try:
        importlib.import_module("mmcv._ext")
    except ModuleNotFoundError:
        raise SetupError(f"mmcv was built without its operators (no PyTorch in sight): {_BUILD_MMCV}") from None
    except ImportError as error:
        raise SetupError(f"mmcv's operators do not fit this PyTorch ({error}): {_BUILD_MMCV}") from None
