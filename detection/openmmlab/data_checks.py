"""Check the data of a training run before it starts, and name the file or setting that is wrong."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import Compose
from mmengine.runner import Runner
from torch import nn

from spatial_mamba_mmcv import MissingOperatorError

from ...kernels.errors import UserError
from .checkpoints import unwrapped
from .commands import in_words

# Heads whose ``num_classes`` is not that of the data set: they classify objects and background, edges, or words.
_OTHER_HEADS = {"RPNHead", "GARPNHead", "STDCHead", "SideAdapterCLIPHead", "GroundingDINOHead", "ATSSVLFusionHead"}
# Likewise the modules whose names contain these words; those in "semantic_head" are for stuff.
_OTHER_NAMES = ("backbone", "semantic_head", "loss")


def check_data(runner: Runner, *parts: str) -> None:
    """Build the loops of a run, compare the classes of their data sets with those of the heads, and have label maps
    checked as they are loaded.

    Args:
        parts: the loops: ``"train"``, ``"val"``, ``"test"``.

    Raises:
        UserError: naming a data set that cannot be read or has no images, or a head with another number of classes.
        OSError: for a missing file.
    """
    for part in parts:
        try:
            loop = getattr(runner, f"{part}_loop")
        except (UserError, OSError, MissingOperatorError):
            raise
        except Exception as error:  # parsers of annotation files raise many types
            reason = in_words(error)
            if "need at least one array to concatenate" in str(error):
                reason = "no images remain; check metainfo.classes, data_prefix and the endings of the files"
            sources = map(_source, leaves(runner.cfg[f"{part}_dataloader"]["dataset"]))
            raise UserError(f"{part}_cfg, {part}_dataloader ({'; '.join(sources)}): {reason}") from error
        if loop is None:
            continue
        datasets = [*leaves(loop.dataloader.dataset)]
        metrics = getattr(getattr(loop, "evaluator", None), "metrics", ())
        for dataset in datasets:
            classes = getattr(dataset, "metainfo", {}).get("classes")
            if classes and type(dataset).__name__ != "MOTChallengeDataset":  # it names more classes than it has
                source = f"the {type(dataset).__name__} of {part}_dataloader"
                _check_names(dataset, classes, source, metrics if len(datasets) == 1 else ())
                _check_heads(runner.model, len(classes), source)
                _check_loading(dataset, len(classes), runner.model)


def _check_names(dataset: Any, classes: Any, source: str, metrics: Sequence[Any]) -> None:
    """Compare the names of classes with those in an annotation file of COCO, whose order numbers the classes.

    Only the metrics of the data set still have the names in the file.
    """
    if isinstance(classes, str):
        raise UserError(f"{source}: metainfo.classes is the text {classes!r}; a single class is written ({classes!r},)")
    ids = getattr(dataset, "cat_ids", classes)
    if len(ids) != len(classes):
        raise UserError(f"{source}: {dataset.ann_file} has {len(ids)} of the {len(classes)} names in metainfo.classes")
    for api in filter(None, (getattr(metric, "_coco_api", None) for metric in metrics)):
        names = [category["name"] for category in api.load_cats(api.get_cat_ids(cat_names=classes))]
        if names != list(classes):
            raise UserError(f"{source}: metainfo.classes must be in the order of its annotation file: {names}")


def head_classes(model: Any) -> dict[str, int]:
    """The number of classes of each head that classifies those of the data set, by its name in the config."""
    found = {}
    for name, head in unwrapped(model).named_modules():
        is_other = any(word in name for word in _OTHER_NAMES) or _OTHER_HEADS & {k.__name__ for k in type(head).__mro__}
        is_binary = getattr(head, "out_channels", None) == 1  # two classes in one channel
        if name and not is_other and not is_binary and isinstance(getattr(head, "num_classes", None), int):
            found[f"model.{name}"] = head.num_classes
    # In panoptic models, which have heads for things and for stuff, the fusion head knows all classes.
    return {name: count for name, count in found.items() if name.endswith("fusion_head")} or found


def _check_heads(model: nn.Module, classes: int, source: str) -> None:
    if wrong := other_counts(model, classes):
        raise UserError(f"{source} has {classes} classes, but {wrong}: set num_classes to {classes}")


def other_counts(model: Any, classes: int) -> str:
    """The heads with another number of classes, in words; empty if there are none."""
    wrong = {name: count for name, count in head_classes(model).items() if count != classes}
    return ", ".join(f"{name}.num_classes is {count}" for name, count in wrong.items())


class _CheckedLoading:
    """A transform that loads annotations, and refuses label maps that would crash the loss (on GPUs without reason)."""

    def __init__(self, load: LoadAnnotations, classes: int, ignored: list[int]) -> None:
        self.load, self.classes, self.ignored = load, classes, ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        path = results.get("seg_map_path")
        try:
            loaded = self.load(results)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        except KeyError as error:
            raise UserError(f"{results.get('img_path')}: an annotation has no {error} to load") from error
        labels, size = (loaded or {}).get("gt_seg_map"), results.get("ori_shape")
        if labels is None or not self.ignored:  # not a data set of mmseg
            return loaded
        if size is not None and labels.shape != tuple(size):
            raise UserError(f"{path}: has shape {labels.shape}, but its image has {size}; it needs one label per pixel")
        large = labels[labels >= self.classes]
        wrong = large[~np.isin(large, self.ignored)]
        if wrong.size:
            less = " (after reduce_zero_label, which subtracts 1)" if results.get("reduce_zero_label") else ""
            raise UserError(
                f"{path}: has the label {wrong.max()}{less}, but the data set has {self.classes} classes; labels must "
                f"be 0 to {self.classes - 1}, or {self.ignored[0]} for pixels to ignore"
            )
        return loaded


def _check_loading(dataset: Any, classes: int, model: nn.Module) -> None:
    """Insert the check. The training data of iteration-based runs without ``ExactResumeHook`` are not checked: their
    loader processes have started.
    """
    pipeline, ignored = getattr(dataset, "pipeline", None), getattr(dataset, "ignore_index", None)
    if not isinstance(pipeline, Compose):
        return
    of_heads = {index for head in model.modules() if isinstance(index := getattr(head, "ignore_index", None), int)}
    values = [] if ignored is None else [ignored, *of_heads]
    pipeline.transforms = [
        _CheckedLoading(step, classes, values) if isinstance(step, LoadAnnotations) else step
        for step in pipeline.transforms
    ]


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets in wrappers, which repeat, join or mix them; or their configs, in that of the wrapper."""
    parts = dataset if isinstance(dataset, dict) else vars(dataset)
    inner = [parts["dataset"]] if "dataset" in parts else parts.get("datasets")
    if inner is None:
        yield dataset
    for child in inner or ():
        yield from leaves(child)


def _source(dataset: Any) -> str:
    """What a config reads a data set from."""
    places = {key: dataset[key] for key in ("data_root", "ann_file", "data_prefix") if dataset.get(key)}
    return ", ".join([str(dataset.get("type")), *(f"{key} {place}" for key, place in places.items())])
