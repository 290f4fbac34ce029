"""Register the backbone, the hooks and mmcv's operators with OpenMMLab's packages, and make checkpoints readable."""

import importlib.util
import pkgutil
import warnings

import spatial_mamba_mmcv

# mmengine imports pkg_resources, and no release without it is expected.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
if not hasattr(pkgutil, "find_loader"):  # Python 3.14 removed it; mmengine and mmcv look for mmcv._ext with it
    pkgutil.find_loader = importlib.util.find_spec  # type: ignore[assignment, attr-defined]
spatial_mamba_mmcv.register()  # in case PyTorch has not done so: TORCH_DEVICE_BACKEND_AUTOLOAD=0

from . import backbone, checkpoints, preemption, resume  # noqa: E402, F401
