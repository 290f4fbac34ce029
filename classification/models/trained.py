"""A classifier as a checkpoint holds it: the architecture is read off the weights, the rest off the config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from .architecture import architecture_of
from .preprocessing import Preprocessing, preprocessing_of
from .spatial_mamba import SpatialMamba
from .weights import WeightsError, ema_state_dict_of, load_strictly, read_checkpoint, state_dict_of


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in evaluation mode, and what is needed to use it.

    Attributes:
        model: on the CPU when it comes from ``load_classifier``.
        preprocessing: of the images it was evaluated on.
        class_names: one per logit, if the checkpoint names them.
    """

    model: SpatialMamba
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: tuple[str, ...] | None = None


def load_classifier(path: str | PathLike[str], ema: bool = False) -> TrainedClassifier:
    """The classifier in a checkpoint of this project or a published one, whatever its variant; strictly loaded.

    Args:
        path: of the file.
        ema: take the EMA weights.

    Raises:
        WeightsError: if the file is missing, unsafe or damaged, holds no classifier, or no EMA weights.
    """
    checkpoint = read_checkpoint(path)
    state = ema_state_dict_of(checkpoint, path) if ema else state_dict_of(checkpoint, path)
    architecture = architecture_of(state)
    if architecture is None:
        raise WeightsError(f"{path}: holds no Spatial-Mamba classifier (python -m spatial_mamba.checkpoint inspect)")
    if architecture.num_classes is None:
        raise WeightsError(f"{path}: holds a backbone without a classifier; name a classification checkpoint")
    model = SpatialMamba(**architecture.options())
    load_strictly(model, state, path)
    return TrainedClassifier(model.eval(), preprocessing_of(checkpoint.get("config")), _class_names(checkpoint, model))


def _class_names(checkpoint: Mapping[str, Any], model: SpatialMamba) -> tuple[str, ...] | None:
    names = checkpoint.get("classes")
    return tuple(map(str, names)) if isinstance(names, list) and len(names) == model.num_classes else None
