"""Check the data of a training run before it starts, and name the file or setting that is wrong."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import Compose
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from spatial_mamba_mmcv import MissingOperatorError

from ...kernels.errors import UserError

# Heads that classify something else than the data set's classes: objects, edges, words of a text.
_OTHER_HEADS = ("RPNHead", "STDCHead", "SideAdapterCLIPHead", "GroundingDINOHead", "ATSSVLFusionHead")


def check_data(runner: Runner) -> None:
    """Build the loops of a training run, compare the classes of their data sets with those of the heads, and have label
    maps checked as they are loaded.

    Raises:
        UserError: naming a data set that cannot be read or has no images, or a head with another number of classes.
        OSError: for a missing file.
    """
    for part in ("train", "val"):
        try:
            loop = getattr(runner, f"{part}_loop")
        except (UserError, OSError, MissingOperatorError):
            raise
        except Exception as error:  # of many types: annotation files are programs' input
            reason = f"{type(error).__name__}: {error}"
            if "need at least one array to concatenate" in str(error):
                reason = "no image is left; compare metainfo.classes, data_prefix and the endings with the files"
            sources = map(_source, dataset_configs(runner.cfg[f"{part}_dataloader"]["dataset"]))
            raise UserError(f"{part}_cfg, {part}_dataloader ({'; '.join(sources)}): {reason}") from error
        if loop is None:
            continue
        for dataset in _leaves(loop.dataloader.dataset):
            if classes := getattr(dataset, "metainfo", {}).get("classes"):
                _check_heads(runner.model, len(classes), f"the {type(dataset).__name__} of {part}_dataloader")
                _check_label_maps(dataset, len(classes), runner.model)


def head_classes(model: Any) -> dict[str, int]:
    """The number of classes of each head that classifies those of the data set, by its name in the config."""
    if is_model_wrapper(model):
        model = model.module
    heads = {f"model.{name}": head for name, head in model.named_modules() if name and "loss" not in name}
    return {
        name: head.num_classes
        for name, head in heads.items()
        if isinstance(getattr(head, "num_classes", None), int)
        and type(head).__name__ not in _OTHER_HEADS
        and getattr(head, "out_channels", None) != 1  # two classes in one channel
    }


def _check_heads(model: nn.Module, classes: int, source: str) -> None:
    """Panoptic models have heads for things, for stuff and for all classes, so one of them must have the number."""
    heads = head_classes(model)
    if heads and classes not in heads.values():
        found = ", ".join(f"{name}.num_classes is {count}" for name, count in heads.items())
        raise UserError(f"{source} has {classes} classes, but {found}: set num_classes of the heads to {classes}")


class _LabelCheck:
    """A transform that checks the label map of an image, which loss functions would index out of bounds."""

    def __init__(self, classes: int, ignored: list[int]) -> None:
        self.classes, self.ignored = classes, ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels, size = results.get("gt_seg_map"), results.get("ori_shape")
        if labels is None:
            return results
        path = results.get("seg_map_path")
        if size is not None and labels.shape != tuple(size):
            raise UserError(f"{path}: has shape {labels.shape}, but one label per pixel of its image is needed, {size}")
        large = labels[labels >= self.classes]
        wrong = large[~np.isin(large, self.ignored)]
        if wrong.size:
            raise UserError(
                f"{path}: has the label {wrong.max()}, but the data set has {self.classes} classes; labels must be "
                f"0 to {self.classes - 1}, or {self.ignored[0]} for pixels to ignore (reduce_zero_label subtracts 1)"
            )
        return results


def _check_label_maps(dataset: Any, classes: int, model: nn.Module) -> None:
    """Insert the check after maps are loaded. Iteration-based loops have started their loader processes by now, and
    start them again only with ``ExactResumeHook``.
    """
    pipeline, ignored = getattr(dataset, "pipeline", None), getattr(dataset, "ignore_index", None)
    if ignored is None or not isinstance(pipeline, Compose):
        return
    of_heads = {index for head in model.modules() if isinstance(index := getattr(head, "ignore_index", None), int)}
    steps = pipeline.transforms
    for position in reversed([i for i, step in enumerate(steps) if isinstance(step, LoadAnnotations)]):
        steps.insert(position + 1, _LabelCheck(classes, [ignored, *of_heads]))


def _leaves(dataset: Any) -> Iterator[Any]:
    """The data sets in wrappers, which repeat, join or mix them."""
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", None)
    if inner is None:
        yield dataset
    for child in inner or ():
        yield from _leaves(child)


def dataset_configs(dataset: Any) -> Iterator[Any]:
    """The configs of the data sets in wrappers."""
    inner = [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets")
    if inner is None:
        yield dataset
    for child in inner or ():
        yield from dataset_configs(child)


def _source(dataset: Any) -> str:
    """What a config reads a data set from."""
    places = {key: dataset[key] for key in ("data_root", "ann_file", "data_prefix") if dataset.get(key)}
    return ", ".join([str(dataset.get("type")), *(f"{key} {place}" for key, place in places.items())])
