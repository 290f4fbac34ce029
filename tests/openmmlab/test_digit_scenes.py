"""The generated data sets of detection and segmentation: exact, reproducible, written atomically, readable."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("cv2")

import spatial_mamba.detection.demo_data as coco
import spatial_mamba.segmentation.demo_data as ade
from spatial_mamba.classification.data_folder import run_demo_data
from spatial_mamba.detection.openmmlab import digit_scenes as scenes_module
from spatial_mamba.detection.openmmlab.digit_scenes import Scene, Sources, compose, load_sources, scenes
from spatial_mamba.kernels.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTS = {"train": 17, "val": 16}  # the sixteenth has no digit


@pytest.fixture(scope="module")
def made() -> dict[str, list[Scene]]:
    return {split: list(scenes(split, count)) for split, count in COUNTS.items()}


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits_coco"
    coco.write_digits(folder, COUNTS)
    return folder


@pytest.fixture(scope="module")
def ade_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits_ade"
    ade.write_digits(folder, COUNTS)
    return folder


def test_scenes_hold_visible_digits_that_do_not_overlap(made: dict[str, list[Scene]]) -> None:
    values = set()
    for scene in made["train"] + made["val"]:
        assert scene.image.shape == (160, 160, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.classes) == len(scene.masks)
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        anything = scene.masks.any(axis=0)
        for value, mask in zip(scene.classes, scene.masks, strict=True):
            values.add(int(value))
            colour = np.median(scene.image[mask], axis=0)
            rows, columns = np.ix_(mask.any(axis=1), mask.any(axis=0))
            around = scene.image[rows, columns][~anything[rows, columns]]
            assert np.median(np.linalg.norm(around - colour, axis=-1)) > 40
    assert values == set(range(10))
    assert [len(split[15].classes) for split in made.values()] == [0, 0]


def test_no_digit_is_hidden_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes_module, "SIDES", (40, 40))
    sources = load_sources("train")
    one_digit = Sources(sources.photographs, sources.digits[:1], sources.values[:1])
    crowded = [compose(one_digit, np.random.default_rng(seed), size=70, digits=6) for seed in range(20)]
    entire = crowded[0].masks[-1].sum()  # nothing was pasted over the last one
    fractions = np.concatenate([scene.masks.sum(axis=(1, 2)) / entire for scene in crowded])
    assert 0.8 <= fractions.min() < 0.9
    assert fractions.max() == 1
    assert min(len(scene.masks) for scene in crowded) < 6  # some did not fit


def test_scenes_are_the_same_every_time(made: dict[str, list[Scene]]) -> None:
    for split, expected in made.items():
        for scene, same in zip(scenes(split, 5), islice(expected, 5), strict=True):
            for name in ("image", "classes", "masks"):
                np.testing.assert_array_equal(getattr(scene, name), getattr(same, name))
    assert (next(scenes("train", 1, seed=1)).image != made["train"][0].image).any()


def test_training_and_validation_share_nothing() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    train, val = load_sources("train"), load_sources("val")
    parts = zip(train.photographs, val.photographs, datasets.load_sample_images().images, strict=True)
    assert all(np.array_equal(np.concatenate([left, right], axis=1), whole) for left, right, whole in parts)
    digits = datasets.load_digits()
    both = [(*digit.ravel() * 16, value) for s in (train, val) for digit, value in zip(s.digits, s.values, strict=True)]
    assert sorted(both) == sorted((*d, v) for d, v in zip(digits.data, digits.target, strict=True))
    assert len(val.values) == 360
    assert np.ptp(np.bincount(val.values)) <= 3


def test_boxes_and_polygons_are_exact(coco_folder: Path, made: dict[str, list[Scene]]) -> None:
    pycoco = pytest.importorskip("pycocotools.coco")
    for split, expected in made.items():
        data = pycoco.COCO(coco_folder / "annotations" / f"instances_{split}.json")
        assert [category["name"] for category in data.loadCats(data.getCatIds())] == list("0123456789")
        assert len(data.imgs) == len(expected)
        for (image_id, image), scene in zip(data.imgs.items(), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(coco_folder / split / image["file_name"])), scene.image)
            assert (image["height"], image["width"]) == scene.masks.shape[1:]
            annotations = data.imgToAnns[image_id]
            for annotation, value, mask in zip(annotations, scene.classes, scene.masks, strict=True):
                np.testing.assert_array_equal(data.annToMask(annotation).astype(bool), mask)
                assert sum(map(shoelace, annotation["segmentation"])) == annotation["area"] == mask.sum()
                left, top, width, height = annotation["bbox"]
                assert mask[top : top + height, left : left + width].sum() == mask.sum()
                assert min(mask[:, left].sum(), mask[:, left + width - 1].sum()) > 0
                assert min(mask[top].sum(), mask[top + height - 1].sum()) > 0
                assert (annotation["category_id"], annotation["iscrowd"]) == (value + 1, 0)


def test_polygons_cover_any_mask_exactly() -> None:
    mask_tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for fraction in np.linspace(0.02, 1, 50):  # specks, then mazes with islands in holes, then a full square
        mask = rng.random((12, 15)) <= fraction
        polygons = coco.outline(mask)
        assert sum(map(shoelace, polygons)) == mask.sum()
        if mask.any():
            parts = mask_tools.frPyObjects([[float(x) for x in polygon] for polygon in polygons], *mask.shape)
            np.testing.assert_array_equal(mask_tools.decode(mask_tools.merge(parts)).astype(bool), mask)
    assert coco.outline(np.zeros((4, 4), bool)) == []


def shoelace(polygon: list[int]) -> float:
    """The area inside [x0, y0, x1, y1, ...]."""
    x, y = np.array(polygon).reshape(-1, 2).T
    return abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2


def test_label_maps_agree_with_the_masks(ade_folder: Path, made: dict[str, list[Scene]]) -> None:
    for split, name in (("train", "training"), ("val", "validation")):
        for number, scene in enumerate(made[split], 1):
            labels = np.asarray(Image.open(ade_folder / "annotations" / name / f"{number:06d}.png"))
            image = np.asarray(Image.open(ade_folder / "images" / name / f"{number:06d}.jpg"), dtype=float)
            assert np.abs(image - scene.image).mean() < 8  # JPEG is not exact
            np.testing.assert_array_equal(labels == 1, ~scene.masks.any(axis=0))
            for value in set(scene.classes.tolist()):
                same = scene.masks[scene.classes == value].any(axis=0)
                np.testing.assert_array_equal(labels == value + 2, same)
            assert set(np.unique(labels)) <= {1, *(scene.classes + 2)}


@pytest.mark.parametrize("module", [coco, ade])
def test_folders_are_written_atomically(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, folder = {"train": 2, "val": 1}, tmp_path / "new" / "digits"

    def interrupted(split: str, count: int) -> Iterator[Scene]:
        yield from scenes(split, 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "scenes", interrupted)
        module.write_digits(folder, counts)
    assert not folder.exists()
    module.write_digits(folder, counts)
    assert list(folder.parent.iterdir()) == [folder]
    images = sorted(folder.rglob("0*"))
    before = {path: path.stat().st_mtime_ns for path in images}
    module.write_digits(folder, counts)
    assert {path: path.stat().st_mtime_ns for path in images} == before

    images[0].unlink()  # an incomplete data set, which is not changed
    package = module.__name__.split(".")[-2]
    assert run_demo_data(package, lambda path: module.write_digits(path, counts), [str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{folder}: exists and is not this data set; remove it" in message
    assert all(path.exists() for path in images[1:])


def test_missing_scikit_learn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        coco.write_digits(tmp_path / "digits", {"train": 1, "val": 1})


def test_mmdet_reads_the_digits(coco_folder: Path, made: dict[str, list[Scene]]) -> None:
    pytest.importorskip("mmdet")
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    build = dataset_builder(CONFIGS / "detection" / "mask_rcnn_spatialmamba_fpn_digits.py", DATASETS.build)
    for split, expected in made.items():
        dataset = build(split, coco_folder)
        assert len(dataset) == len(expected)  # including those without a digit
        for index, scene in enumerate(expected):
            sample = dataset[index]
            truth = sample["data_samples"].gt_instances
            assert sample["inputs"].shape == (3, 160, 160)
            np.testing.assert_array_equal(truth.labels, scene.classes)
            np.testing.assert_array_equal(truth.masks.to_ndarray(), scene.masks)
            for box, mask in zip(truth.bboxes.tensor, scene.masks, strict=True):
                left, top, right, bottom = box.int().tolist()
                assert mask[top:bottom, left:right].sum() == mask.sum()
        if split == "val":  # in mmdet, BGR
            np.testing.assert_array_equal(dataset[0]["inputs"].numpy()[::-1].transpose(1, 2, 0), expected[0].image)


def test_mmseg_reads_the_digits(ade_folder: Path, made: dict[str, list[Scene]]) -> None:
    pytest.importorskip("mmseg")
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    build = dataset_builder(CONFIGS / "segmentation" / "upernet_spatialmamba_digits.py", DATASETS.build)
    for split, expected in made.items():
        dataset = build(split, ade_folder)
        assert len(dataset) == len(expected)
        assert dataset.metainfo["classes"] == ("photograph", *"0123456789")
        for index, scene in enumerate(expected):
            sample = dataset[index]
            assert sample["inputs"].shape == (3, 160, 160)
            labels = sample["data_samples"].gt_sem_seg.data[0].numpy()
            np.testing.assert_array_equal(labels, ade.label_map(scene) - 1)  # reduce_zero_label


def dataset_builder(config: Path, build: Callable) -> Callable[[str, Path], object]:
    """A function that builds the config's data set of a split, from another folder."""
    from mmengine import Config

    settings = Config.fromfile(config)
    return lambda split, folder: build(settings[f"{split}_dataloader"].dataset.to_dict() | {"data_root": str(folder)})


def test_configs_name_the_files_that_are_written(coco_folder: Path) -> None:
    pytest.importorskip("mmdet")
    from mmengine import Config

    config = Config.fromfile(CONFIGS / "detection" / "mask_rcnn_spatialmamba_fpn_digits.py")
    file = coco_folder / Path(config.val_evaluator.ann_file).relative_to("data/digits_coco")
    assert len(json.loads(file.read_text())["images"]) == COUNTS["val"]
