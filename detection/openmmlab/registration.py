"""Makes mmcv's operators, the backbone and the hooks known to OpenMMLab's packages, and the checkpoints readable."""

import importlib.util
import pkgutil
import warnings

import spatial_mamba_mmcv

# mmengine asks for it with every import, and can do nothing about it any more.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
if not hasattr(pkgutil, "find_loader"):  # Python 3.14 has removed it; mmengine and mmcv ask it for mmcv._ext
    pkgutil.find_loader = importlib.util.find_spec
spatial_mamba_mmcv.register()  # where PyTorch has not, such as with TORCH_DEVICE_BACKEND_AUTOLOAD=0

from . import backbone, resume  # noqa: E402, F401
from .checkpoints import admit_safe_types  # noqa: E402

admit_safe_types()
