"""The models that can be compared: Spatial-Mamba, its baseline, and timm's models of the same sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from ...kernels.benchmark.report import matching
from ..models.spatial_mamba import PUBLISHED_TOP1
from .baseline import as_baseline

BASE_RESOLUTION = 224  # of the published accuracies
DROP_PATH_RATE = 0.2  # the same for all models, so that training does the same kind of work
OURS, BASELINE = "Spatial-Mamba", "baseline"
# Sources of the accuracies below. A1 is timm's recipe (resnet50.a1_in1k); the original one reaches 76.1.
SOURCES = {
    OURS: "arXiv 2410.15091",
    BASELINE: "arXiv 2410.15091",
    "Swin": "arXiv 2103.14030",
    "ConvNeXt": "arXiv 2201.03545",
    "MambaOut": "arXiv 2405.07992",
    "ResNet (A1)": "arXiv 2110.00476",
}


@dataclass(frozen=True)
class Model:
    """A model to compare.

    Attributes:
        name: in timm's registry; after ``baseline/`` for the baseline.
        family: a key of ``SOURCES``.
        accuracy: published ImageNet-1K top-1 in percent, trained only on ImageNet-1K, at 224x224.
    """

    name: str
    family: str
    accuracy: float

    @property
    def is_peer(self) -> bool:
        """Whether it is one of timm's own models."""
        return self.family not in (OURS, BASELINE)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory formats to try.

        Spatial-Mamba keeps its tokens channels-last, the baseline uses contiguous maps for its convolutions, and Swin
        has a single convolution.
        """
        fixed = {OURS: ("channels-last",), BASELINE: ("contiguous",), "Swin": ("contiguous",)}
        return fixed.get(self.family, ("channels-last", "contiguous"))

    def create(self, resolution: int) -> nn.Module:
        """The model with random weights, in training mode, for images of that side.

        Raises:
            Exception: of any type, if the model cannot take that resolution.
        """
        size: dict[str, Any] = {"img_size": resolution} if self.family == "Swin" else {}
        module: Any = timm.create_model(self.name.removeprefix("baseline/"), drop_path_rate=DROP_PATH_RATE, **size)
        return as_baseline(module) if self.family == BASELINE else module


MODELS = {
    model.name: model
    for model in (
        *(Model(name, OURS, accuracy) for name, accuracy in PUBLISHED_TOP1.items()),
        Model("swin_tiny_patch4_window7_224", "Swin", 81.3),
        Model("swin_small_patch4_window7_224", "Swin", 83.0),
        Model("swin_base_patch4_window7_224", "Swin", 83.5),
        Model("convnext_tiny", "ConvNeXt", 82.1),
        Model("convnext_small", "ConvNeXt", 83.1),
        Model("convnext_base", "ConvNeXt", 83.8),
        Model("mambaout_tiny", "MambaOut", 82.7),
        Model("mambaout_small", "MambaOut", 84.1),
        Model("mambaout_base", "MambaOut", 84.2),
        Model("resnet50", "ResNet (A1)", 80.4),
        *(Model(f"baseline/{name}", BASELINE, accuracy) for name, accuracy in PUBLISHED_TOP1.items()),
    )
}


def choose(globs: Sequence[str]) -> list[Model]:
    """The models whose names match, in the order of the globs.

    Raises:
        UserError: for a glob that matches none.
    """
    return [MODELS[name] for name in matching("--models", globs, list(MODELS))]
