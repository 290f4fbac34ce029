"""Checkpoints of mmengine: read safely, refused if they are harmful or do not fit."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader

from spatial_mamba.classification.models.weights import WeightsError, read_checkpoint
from spatial_mamba.detection.openmmlab.checkpoints import fitting_weights

load_checkpoint = CheckpointLoader.load_checkpoint


def mmengine_checkpoint(**more: object) -> dict:
    """A checkpoint like those of mmengine's runner: weights, histories of logged values, NumPy arrays and scalars."""
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    return {
        "meta": {"epoch": 1, "iter": 4, "dataset_meta": {"classes": ("a", "b")}, "seed": 7},
        "state_dict": {"backbone.weight": torch.arange(3.0)},
        "message_hub": {
            "log_scalars": {"train/loss": history},
            "runtime_info": {"best": np.float32(0.5), "sizes": np.arange(3), "flag": np.bool_(True), **more},
        },
    }


class Harmful:
    """An action that a checkpoint must not be able to trigger."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm-done",)


class Reaching:
    """With getattr, a harmless object would give access to everything."""

    def __reduce__(self) -> tuple:
        return getattr, (HistoryBuffer, "__init__")


def rename_numpy_1(path: Path) -> None:
    """Give NumPy's functions the names they had before NumPy 2, as in the released files."""
    with zipfile.ZipFile(path) as archive:
        entries = {item: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for item, content in entries.items():
            renamed = content.replace(b"numpy._core.", b"numpy.core.") if item.filename.endswith(".pkl") else content
            archive.writestr(item, renamed)


@pytest.mark.parametrize("numpy_version", [1, 2])
def test_mmengine_checkpoints_load(tmp_path: Path, numpy_version: int) -> None:
    path = tmp_path / "epoch_1.pth"
    torch.save(mmengine_checkpoint(), path, pickle_protocol=2 * numpy_version)
    if numpy_version == 1:
        rename_numpy_1(path)
        assert b"numpy.core.multiarray" in zipfile.ZipFile(path).read("epoch_1/data.pkl")
    hub = load_checkpoint(str(path))["message_hub"]
    history = hub["log_scalars"]["train/loss"]
    assert type(history) is HistoryBuffer and history.mean(2) == 0.375
    assert history.statistics("current") == 0.25
    assert hub["runtime_info"]["sizes"].tolist() == [0, 1, 2]
    assert hub["runtime_info"]["best"] == np.float32(0.5)
    torch.testing.assert_close(read_checkpoint(path)["state_dict"]["backbone.weight"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("thing", "name"), [(Harmful(), "mkdir"), (Reaching(), "getattr"), (re.compile("x"), "re._compile")]
)
def test_foreign_types_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: object, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(mmengine_checkpoint(thing=thing), "bad.pth")
    for read in (read_checkpoint, load_checkpoint):
        with pytest.raises(WeightsError, match=rf"bad\.pth: refused, because it asks to load .*{name}"):
            read("bad.pth")
    assert not Path("harm-done").exists()


class Pickled:
    """Pickles as a call, with a state that is set afterwards."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple:
        return self.parts


RECONSTRUCT = np.zeros(0).__reduce__()[0]
FIELDS = (3, "<", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 8, 1)


@pytest.mark.parametrize(
    "thing",
    [
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, ">f8"),
        np.dtype([("a", "f8")]),
        Pickled(np.dtype, ("O8",)),
        Pickled(np.dtype, ("f8",), FIELDS),
        Pickled(np.ndarray, ((4,), np.dtype("u1"), np.zeros(4, np.uint8))),
        Pickled(RECONSTRUCT, (HistoryBuffer, (0,), b"b")),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("f8"), False, [1.0, 2.0])),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("f8"), False, b"short")),
    ],
    ids=[
        "objects",
        "text",
        "big-endian",
        "record",
        "object dtype",
        "dtype with fields",
        "ndarray called",
        "reconstructed as another type",
        "content as a list",
        "content too short",
    ],
)
def test_forged_numpy_objects_are_refused(tmp_path: Path, thing: object) -> None:
    torch.save(mmengine_checkpoint(thing=thing), tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth: "):
        read_checkpoint(tmp_path / "bad.pth")


def test_reading_a_file_changes_no_type(tmp_path: Path) -> None:
    """The methods of histories and NumPy's dtypes cannot be misused; arrays that were read are saved as plain ones."""
    forged = HistoryBuffer([1.0, 3.0], [1, 1])
    forged._statistics_methods = {"mean": "harm"}
    torch.save({"forged": forged, "array": np.arange(3)}, tmp_path / "a")
    checkpoint = load_checkpoint(str(tmp_path / "a"))
    assert type(checkpoint["forged"]) is HistoryBuffer
    assert checkpoint["forged"].statistics("mean") == HistoryBuffer([1.0, 3.0], [1, 1]).statistics("mean") == 2
    assert np.dtype("f8").fields is None and "_statistics_methods" not in vars(checkpoint["forged"])
    assert isinstance(checkpoint["array"], np.ndarray)
    assert type(pickle.loads(pickle.dumps(checkpoint["array"]))) is np.ndarray


def test_a_config_inside_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoint = {"meta": {"config": "import os"}, "state_dict": model.state_dict()}
    runner = SimpleNamespace(model=model, _load_from="a.pth")
    HOOKS.build(dict(type="StrictLoadHook")).after_load_checkpoint(runner, checkpoint)
    assert checkpoint["meta"] == {}  # mmengine would look for it here


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"meta": [], "state_dict": {"weight": torch.ones(1)}}, "its meta is not a dictionary"),
        ({"meta": {}, "state_dict": [1]}, "found no model weights"),
        ({"meta": {}, "state_dict": {"weight": 1}}, "found no model weights"),
    ],
)
def test_a_checkpoint_without_weights_is_refused(checkpoint: dict, message: str) -> None:
    runner = SimpleNamespace(model=nn.Linear(2, 2), _load_from="a.pth")
    with pytest.raises(WeightsError, match=rf"a\.pth: {message}"):
        HOOKS.build(dict(type="StrictLoadHook")).after_load_checkpoint(runner, checkpoint)


@pytest.mark.parametrize(
    "attributes",
    [{"_log_history": ["a"]}, {"_count_history": np.ones(1)}, {"max_length": 0}, {"_log_history": np.ones((1, 2))}],
)
def test_a_forged_history_is_refused(tmp_path: Path, attributes: dict) -> None:
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    vars(history).update(attributes)
    torch.save({"history": history}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a history of mmengine is wrong"):
        load_checkpoint(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("at_top", [False, True], ids=["under state_dict", "at the top level"])
def test_prefixes_of_wrappers_are_removed_before_mmengine_loads(at_top: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    state = nn.DataParallel(nn.Sequential(torch.compile(model[0]))).state_dict()
    checkpoint = state if at_top else {"state_dict": state}
    runner = SimpleNamespace(model=model, _load_from="a.pth")
    HOOKS.build(dict(type="StrictLoadHook")).after_load_checkpoint(runner, checkpoint)
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    assert checkpoint["state_dict"]._metadata["0"] == dict(version=2)


def test_a_checkpoint_must_fit_in_every_entry() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = model.state_dict()
    fitting_weights(model, {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, "x.pth")
    del state["1.bias"]
    with pytest.raises(WeightsError, match=r"x\.pth: does not fit this model in 1 entries: 1\.bias is missing"):
        fitting_weights(model, {"state_dict": state}, "x.pth")
    fitting_weights(model, {"state_dict": state}, "x.pth", may_differ=("1.",))
    for prefixes in ("1.", ["1."]):
        assert HOOKS.build(dict(type="StrictLoadHook", may_differ=prefixes)).may_differ == ("1.",)
