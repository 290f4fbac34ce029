"""Who can be compared: Spatial-Mamba, its published formulation, and timm's models of the same sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import timm
from torch import nn

BASE_RESOLUTION = 224  # of the published accuracies, and what costs per pixel are relative to
DROP_PATH_RATE = 0.2  # the same for all, so that training does the same kind of work in all
OURS, PUBLISHED = "Spatial-Mamba", "Spatial-Mamba as published"


@dataclass(frozen=True)
class Model:
    """A model by the name that the user chooses it by.

    Attributes:
        accuracy: published ImageNet-1K top-1 in percent, trained on ImageNet-1K alone, at 224x224.
    """

    name: str
    family: str
    accuracy: float

    @property
    def fuses(self) -> bool:
        """Whether it has an inference form of its own, ``fuse()``."""
        return self.family == OURS

    @property
    def as_written(self) -> bool:
        """Whether it takes part as it is written alone, whatever forms the others have."""
        return self.family == PUBLISHED

    @property
    def is_peer(self) -> bool:
        return self.family not in (OURS, PUBLISHED)

    @property
    def layouts(self) -> tuple[bool, ...]:
        """Which memory formats are worth a trial: channels-last (True), contiguous (False).

        Spatial-Mamba keeps its tokens channels-last; its published formulation keeps maps contiguous where it
        convolves, and Swin has a single convolution.
        """
        fixed = {OURS: (True,), PUBLISHED: (False,), "Swin": (False,)}
        return fixed.get(self.family, (True, False))

    def create(self, resolution: int) -> nn.Module:
        """The model with random weights, in training mode, for images of that side; the published one in our form.

        Raises:
            Exception: whatever the model objects to the resolution with.
        """
        size = {"img_size": resolution} if self.family == "Swin" else {}
        return timm.create_model(self.name.removeprefix("published/"), drop_path_rate=DROP_PATH_RATE, **size)


# Where the accuracies below come from. A1 is timm's recipe (resnet50.a1_in1k); the original one reaches 76.1.
SOURCES = {
    OURS: "arXiv 2410.15091",
    PUBLISHED: "arXiv 2410.15091",
    "Swin": "arXiv 2103.14030",
    "ConvNeXt": "arXiv 2201.03545",
    "MambaOut": "arXiv 2405.07992",
    "ResNet (A1)": "arXiv 2110.00476",
}
_ACCURACIES = {
    OURS: {"spatial_mamba_tiny": 83.5, "spatial_mamba_small": 84.6, "spatial_mamba_base": 85.3},
    "Swin": {
        "swin_tiny_patch4_window7_224": 81.3,
        "swin_small_patch4_window7_224": 83.0,
        "swin_base_patch4_window7_224": 83.5,
    },
    "ConvNeXt": {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8},
    "MambaOut": {"mambaout_tiny": 82.7, "mambaout_small": 84.1, "mambaout_base": 84.2},
    "ResNet (A1)": {"resnet50": 80.4},
}
MODELS = [
    *(Model(name, family, top1) for family, known in _ACCURACIES.items() for name, top1 in known.items()),
    *(Model(f"published/{name}", PUBLISHED, top1) for name, top1 in _ACCURACIES[OURS].items()),
]


def choose(globs: Sequence[str], peers: bool) -> list[Model]:
    """The models that match, in the order of the globs.

    Args:
        globs: names, or patterns of names.
        peers: whether models other than Spatial-Mamba's take part.

    Raises:
        ValueError: for a glob that matches none, or if no model is left.
    """
    known = [model for model in MODELS if peers or not model.is_peer]
    chosen: dict[str, Model] = {}
    for glob in globs:
        found = {model.name: model for model in known if fnmatchcase(model.name, glob)}
        if not found:
            raise ValueError(f"{glob!r} matches none of {', '.join(model.name for model in known)}")
        chosen |= {name: model for name, model in found.items() if name not in chosen}
    return list(chosen.values())
