"""Check the data of a training run before it starts, and name the file or setting that is wrong."""

from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadAnnotations
from mmengine.dataset import Compose
from mmengine.runner import Runner
from torch import nn

from spatial_mamba_mmcv import MissingOperatorError

from ...kernels.errors import UserError

# Parts of the names of modules whose ``num_classes`` is not the number of the data set's classes.
_OTHER_CLASSES = ("backbone", "rpn_head", "semantic_head", "fusion_head", "loss")


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
            if classes := dataset.metainfo.get("classes"):
                _check_heads(runner.model, len(classes), f"the {type(dataset).__name__} of {part}_dataloader")
                _check_label_maps(dataset, len(classes))


def head_classes(model: nn.Module) -> dict[str, int]:
    """The number of classes of each module that classifies those of the data set, by name."""
    counts = {name: getattr(module, "num_classes", None) for name, module in model.named_modules()}
    return {
        name: count
        for name, count in counts.items()
        if isinstance(count, int) and not any(other in name for other in _OTHER_CLASSES)
    }


def _check_heads(model: nn.Module, classes: int, source: str) -> None:
    for name, count in head_classes(model).items():
        if count != classes:
            key = f"model.{name.removeprefix('module.')}.num_classes"
            raise UserError(f"{source} has {classes} classes, but {key} is {count}; set it to {classes}")


class _LabelCheck:
    """A transform that checks the label map of an image, which loss functions would index out of bounds."""

    def __init__(self, classes: int, ignored: int) -> None:
        self.classes, self.ignored = classes, ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels = results.get("gt_seg_map")
        if labels is None:
            return results
        path, size = results.get("seg_map_path"), tuple(results["img"].shape[:2])
        if labels.shape != size:
            raise UserError(f"{path}: has shape {labels.shape}, but one label per pixel of its image is needed, {size}")
        largest = labels[labels != self.ignored].max(initial=0)
        if largest >= self.classes:
            raise UserError(
                f"{path}: has the label {largest}, but the data set has {self.classes} classes; labels must be "
                f"0 to {self.classes - 1}, or {self.ignored} for pixels to ignore (reduce_zero_label subtracts 1)"
            )
        return results


def _check_label_maps(dataset: Any, classes: int) -> None:
    pipeline, ignored = getattr(dataset, "pipeline", None), getattr(dataset, "ignore_index", None)
    if ignored is None or not isinstance(pipeline, Compose):
        return
    steps = pipeline.transforms
    for position in reversed([i for i, step in enumerate(steps) if isinstance(step, LoadAnnotations)]):
        steps.insert(position + 1, _LabelCheck(classes, ignored))


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
