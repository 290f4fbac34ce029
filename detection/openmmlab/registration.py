"""Makes the backbone and the hooks known to mmengine, and the checkpoints readable."""

import warnings

# mmengine asks for it with every import, and can do nothing about it any more.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from . import backbone, resume  # noqa: E402, F401
from .checkpoints import admit_safe_types  # noqa: E402

admit_safe_types()
