"""Builds a model from a checkpoint: the weights determine the architecture, the config the preprocessing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike

import timm
import torch
from torch import Tensor

from .architecture import Architecture, architecture_of
from .preprocessing import Preprocessing, preprocessing_of
from .spatial_mamba import SpatialMamba, SpatialMambaBackbone
from .weights import WeightsError, describe_differences, model_weights, read_checkpoint, saved_class_names


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in evaluation mode and the information needed to use it.

    Attributes:
        model: the classifier; ``load_classifier`` puts it on the CPU.
        preprocessing: how its images are prepared.
        class_names: one per logit, if the checkpoint has them.
    """

    model: SpatialMamba
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: tuple[str, ...] | None = None

    @property
    def architecture(self) -> Architecture:
        """The architecture of the model.

        Raises:
            RuntimeError: for a fused model.
        """
        architecture = architecture_of(self.model.state_dict())
        if architecture is None:
            raise RuntimeError("a fused model has no weights of a known architecture: read it before fuse()")
        return architecture


def untrained_classifier(name: str) -> TrainedClassifier:
    """The variant that timm knows by ``name``, with initial values that are always the same."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    assert isinstance(model, SpatialMamba)
    return TrainedClassifier(model)


def load_classifier(path: str | PathLike[str], ema: bool = False) -> TrainedClassifier:
    """Load the classifier of any variant strictly from a checkpoint of this project or a published one.

    Args:
        path: the checkpoint.
        ema: load the EMA weights.

    Raises:
        WeightsError: if the file is missing, unsafe or damaged, has no classifier or no EMA weights, or has an invalid
            config.
    """
    checkpoint = read_checkpoint(path)
    state = model_weights(checkpoint, path, ema)
    architecture = architecture_of(state)
    if architecture is None:
        raise WeightsError(f"{path}: holds no Spatial-Mamba classifier (spatial-mamba checkpoint inspect shows more)")
    if architecture.num_classes is None:
        raise WeightsError(f"{path}: holds a backbone without a classifier; name a classification checkpoint")
    try:
        preprocessing = preprocessing_of(checkpoint.get("config"))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    model = model_of(architecture, state, path)
    assert isinstance(model, SpatialMamba)
    names = saved_class_names(checkpoint, architecture.num_classes)
    return TrainedClassifier(model, preprocessing, None if names is None else tuple(names))


def model_of(
    architecture: Architecture, state: Mapping[str, Tensor], path: str | PathLike[str]
) -> SpatialMamba | SpatialMambaBackbone:
    """Build a classifier or backbone in evaluation mode and load its weights strictly.

    Args:
        architecture: inferred from the weights.
        state: the weights.
        path: the file they come from, for messages.

    Raises:
        WeightsError: if the weights do not fit such a model. This is checked before memory is allocated for it.
    """
    kind = SpatialMambaBackbone if architecture.num_classes is None else SpatialMamba
    try:
        with torch.device("meta"):
            skeleton = kind(**architecture.options())
    except ValueError as error:
        raise WeightsError(f"{path}: holds weights of an impossible model: {error}") from error
    if problems := describe_differences(skeleton.state_dict(), state):
        raise WeightsError(f"{path}: {problems}")
    model = kind(**architecture.options())
    model.load_state_dict(state)
    return model.eval()
