"""What detection and segmentation share: the backbone's registration, checkpoints, resuming, the tools."""

from . import backbone, resume  # noqa: F401
from .checkpoints import admit_safe_types

admit_safe_types()
