"""What detection and segmentation share: the registered backbone, checkpoints, exact resumption and the tools."""

import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

import mmdet.registry
import mmseg.registry
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.config import Config
from mmengine.dataset import BaseDataset, InfiniteSampler
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator

from spatial_mamba import SpatialMambaBackbone
from spatial_mamba.classification.models.spatial_mamba import SpatialMamba
from spatial_mamba.classification.models.weights import WeightsError, read_checkpoint
from spatial_mamba.detection.demo_data import write_digits as write_coco_digits
from spatial_mamba.detection.openmmlab import packages, tools
from spatial_mamba.detection.openmmlab.checkpoints import check_fit
from spatial_mamba.detection.openmmlab.resume import ExactResumeHook
from spatial_mamba.segmentation.demo_data import write_digits as write_ade_digits

ROOT = Path(__file__).parents[2]
SMALL = dict(dims=8, depths=(1, 2, 1, 1), drop_path_rate=0.0)


def build(**options: object) -> nn.Module:
    return MODELS.build(dict(type="MM_SpatialMamba", **SMALL, **options))


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# --- the backbone under its registered name ---


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_the_backbone_is_found_from_every_scope(scope: str) -> None:
    registry = {"mmengine": MODELS, "mmdet": mmdet.registry.MODELS, "mmseg": mmseg.registry.MODELS}[scope]
    with DefaultScope.overwrite_default_scope(scope):
        model = registry.build(dict(type="MM_SpatialMamba", **SMALL, out_indices=(1, 3)))
    maps = model(torch.randn(1, 3, 75, 101))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 10, 13), (1, 64, 3, 4)]


def test_it_is_the_backbone_of_the_library() -> None:
    own, model = SpatialMambaBackbone(**SMALL).eval(), build().eval()
    model.load_state_dict(own.state_dict())
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(own(image), model(image), strict=True))


@pytest.mark.parametrize("how", ["pretrained", "init_cfg", "inside a detector"])
def test_a_classification_checkpoint_is_the_start_of_training(tmp_path: Path, how: str) -> None:
    classifier = SpatialMamba(num_classes=7, **SMALL)
    path = tmp_path / "classifier.pth"
    torch.save({"model": classifier.state_dict(), "epoch": 3, "max_accuracy": np.float64(81.2)}, path)
    if how == "inside a detector":
        with DefaultScope.overwrite_default_scope("mmdet"):
            detector = MODELS.build(
                dict(
                    type="mmdet.RetinaNet",
                    backbone=dict(type="MM_SpatialMamba", **SMALL, pretrained=str(path)),
                    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
                    bbox_head=dict(type="RetinaHead", num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1),
                )
            )
        detector.init_weights()
        model = detector.backbone
    else:
        options = {"pretrained": path} if how == "pretrained" else {"init_cfg": init_cfg(path)}
        model = build(**options)
        model.init_weights()
    expected, state = classifier.state_dict(), model.state_dict()
    taken = [name for name in state if not name.startswith("outnorm")]
    assert set(expected) - set(taken) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert all(torch.equal(state[name], expected[name]) for name in taken)
    assert all((state[f"outnorm{i}.weight"] == 1).all() for i in range(4))


@pytest.mark.parametrize("options", [dict(pretrained=""), dict(pretrained=None), dict(init_cfg=None)], ids=str)
def test_empty_names_of_weights_are_none(options: dict) -> None:
    model = build(**options)
    before = model.state_dict()["patch_embed.conv1.conv.weight"].clone()
    model.init_weights()
    assert torch.equal(model.state_dict()["patch_embed.conv1.conv.weight"], before)


def test_the_home_folder_is_known_in_configs_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "own.py").write_text("a = dict(b=[dict(root='~/data')], c=('~/x', 1))\nload_from = '~/w.pth'\n")
    config = tools.load_config("mmdet", "~/own.py", {"work_dir": "~/work"})
    assert [config.load_from, config.work_dir] == [str(tmp_path / "w.pth"), str(tmp_path / "work")]
    assert config.a.b[0].root == str(tmp_path / "data") and config.a.c == (str(tmp_path / "x"), 1)
    args = tools._common_parser("train.py", "").parse_args(["~/own.py", "--work-dir=~/work", "--cfg-options", "a=~/b"])
    assert [args.config, args.work_dir] == [str(tmp_path / "own.py"), str(tmp_path / "work")]
    assert args.cfg_options == {"a": str(tmp_path / "b")}


@pytest.mark.parametrize("prefix", ["student.backbone", "student.backbone."])
def test_weights_under_a_prefix_are_found(tmp_path: Path, prefix: str) -> None:
    state = SpatialMambaBackbone(**SMALL).state_dict()
    named = {f"student.backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**named, "teacher.weight": torch.ones(1)}}, tmp_path / "a.pth")
    entry = dict(init_cfg(tmp_path / "a.pth"), prefix=prefix, map_location="cpu")
    model = build(init_cfg=[entry])
    model.init_weights()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"a\.pth: holds no weights whose names start with other\."):
        build(init_cfg=dict(entry, prefix="other")).init_weights()
    torch.save({**named, **{f"teacher.backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
    build(init_cfg=entry).init_weights()
    with pytest.raises(WeightsError, match=r"several models, named student\.backbone\.\* and teacher\.backbone\.\*"):
        build(pretrained=tmp_path / "a.pth").init_weights()


def test_a_backbone_of_other_channels_starts_from_rgb_weights(tmp_path: Path) -> None:
    weight = torch.arange(4 * 3 * 9.0).view(4, 3, 3, 3)
    state = SpatialMamba(num_classes=7, **SMALL).state_dict() | {"patch_embed.conv1.conv.weight": weight}
    torch.save({"module." + name: tensor for name, tensor in state.items()}, tmp_path / "a.pth")
    model = build(in_chans=1, init_cfg=init_cfg(tmp_path / "a.pth"))
    model.init_weights()
    assert model.patch_embed.conv1.conv.weight.equal(weight.sum(1, keepdim=True))


def test_an_address_is_named_whole() -> None:
    with pytest.raises(WeightsError, match=r"^https://host/tiny\.pth: is an address; download the file"):
        build(pretrained="https://host/tiny.pth").init_weights()


def init_cfg(path: object) -> dict:
    return dict(type="Pretrained", checkpoint=str(path))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: no such checkpoint"):
        build(pretrained=tmp_path / "absent.pth").init_weights()
    state = SpatialMamba(num_classes=7, **SMALL).state_dict()
    for change, message in (
        ({"layers.0.blocks.0.ln_1.weight": None}, r"does not fit this model in 1 entries: layers\.0.*is missing"),
        ({"layers.9.weight": torch.ones(1)}, r"layers\.9\.weight is not part of the model"),
        ({"patch_embed.conv1.conv.weight": torch.ones(1)}, r"conv1\.conv\.weight is \(1,\), the model has"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        torch.save({"model": changed}, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            build(pretrained=tmp_path / "other.pth").init_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pretrained="a.pth", init_cfg=init_cfg("b.pth")), "give one of them"),
        (dict(init_cfg=dict(type="Kaiming", layer="Conv2d")), "init_cfg must be"),
        (dict(init_cfg=[init_cfg("a.pth"), dict(type="Kaiming", layer="Conv2d")]), "init_cfg must be .* a list of one"),
        (dict(init_cfg=init_cfg("")), "init_cfg must be"),
        (
            dict(embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, convert_weights=True),  # Swin's
            "no option convert_weights, embed_dims, num_heads, window_size; .* removed by _delete_=True",
        ),
        (dict(frozen_stages=5), r"-1 \(none\) to 4"),
        (dict(out_indices=(0, 7)), "out_indices must be"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages_are_neither_trained_nor_in_training_mode(frozen: int) -> None:
    model = build(frozen_stages=frozen, out_indices=(1, 3)).train()
    frozen_names = ["patch_embed."] * (frozen >= 0) + [f"layers.{i}." for i in range(frozen)]
    frozen_names += [f"outnorm{i}." for i in (1, 3) if i < frozen]
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    maps = model(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(m.square().sum() for m in maps).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(tuple(frozen_names))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(tuple(frozen_names)), name


def test_norm_eval_keeps_the_statistics_and_trains_the_weights() -> None:
    model = build(norm_eval=True).train()
    assert len(batch_norms(model)) == 8
    assert not any(norm.training for norm in batch_norms(model))
    assert model.training
    assert model.layers[0].blocks[0].training
    before = [norm.running_mean.clone() for norm in batch_norms(model)]
    sum(m.square().sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    for norm, mean in zip(batch_norms(model), before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad.abs().sum() > 0


def test_with_cp_changes_no_number() -> None:
    plain, recomputing = build().train(), build(with_cp=True).train()
    recomputing.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (plain, recomputing):
        maps = model(image)
        sum(m.square().sum() for m in maps).backward()
        outputs.append([*maps, *(p.grad for p in model.parameters())])
    for expected, got in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected)


# --- checkpoints ---


def mmengine_checkpoint(**more: object) -> dict:
    """As a runner of mmengine saves it: histories of logged values, NumPy arrays and scalars beside the weights."""
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
    """What a checkpoint must not be able to do."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm-done",)


class Reaching:
    """getattr on a harmless object leads to everything."""

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
def test_mmengine_checkpoints_load_with_weights_only(tmp_path: Path, numpy_version: int) -> None:
    path = tmp_path / "epoch_1.pth"
    torch.save(mmengine_checkpoint(), path)
    if numpy_version == 1:
        rename_numpy_1(path)
        assert b"numpy.core.multiarray" in zipfile.ZipFile(path).read("epoch_1/data.pkl")
    for _ in range(2):  # reading one takes nothing away that the next needs
        for checkpoint in (torch.load(path, weights_only=True), read_checkpoint(path)):
            hub = checkpoint["message_hub"]
            history = hub["log_scalars"]["train/loss"]
            assert history.mean(2) == 0.375
            assert history.statistics("current") == 0.25
            assert hub["runtime_info"]["sizes"].tolist() == [0, 1, 2]
            assert hub["runtime_info"]["best"] == np.float32(0.5)


@pytest.mark.parametrize(
    ("thing", "name"), [(Harmful(), "mkdir"), (Reaching(), "getattr"), (re.compile("x"), "re._compile")]
)
def test_foreign_types_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: object, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(mmengine_checkpoint(thing=thing), "bad.pth")
    with pytest.raises(pickle.UnpicklingError, match=name):
        torch.load("bad.pth", weights_only=True)
    with pytest.raises(WeightsError, match=rf"bad\.pth: refused, because it asks to load .*{name}"):
        read_checkpoint("bad.pth")
    assert not Path("harm-done").exists()


class Pickled:
    """Pickles as a call, and a state set afterwards."""

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
        Pickled(np.ndarray, ((4,), np.dtype("u1"), np.zeros(4, np.uint8))),
        Pickled(RECONSTRUCT, (HistoryBuffer, (0,), b"b")),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("f8"), False, [1.0, 2.0])),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("f8"), False, b"short")),
    ],
    ids=str,
)
def test_forged_numpy_objects_are_refused(tmp_path: Path, thing: object) -> None:
    torch.save(mmengine_checkpoint(thing=thing), tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth: "):
        read_checkpoint(tmp_path / "bad.pth")


def test_files_change_no_type(tmp_path: Path) -> None:
    """Neither the methods of all histories, nor NumPy's dtypes; what was read is saved as what it stands for."""
    forged = HistoryBuffer([1.0, 3.0], [1, 1])
    forged._statistics_methods = {"mean": "harm"}
    torch.save({"forged": forged, "array": np.arange(3), "strange": Pickled(np.dtype, ("f8",), FIELDS)}, tmp_path / "a")
    checkpoint = read_checkpoint(tmp_path / "a")
    assert type(checkpoint["forged"]) is HistoryBuffer
    assert checkpoint["forged"].statistics("mean") == HistoryBuffer([1.0, 3.0], [1, 1]).statistics("mean") == 2
    assert np.dtype("f8").fields is None
    assert isinstance(checkpoint["array"], np.ndarray)
    assert type(pickle.loads(pickle.dumps(checkpoint["array"]))) is np.ndarray


def test_a_config_inside_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoint = {"meta": {"config": "import os"}, "state_dict": model.state_dict()}
    runner = SimpleNamespace(model=model, _load_from="a.pth")
    HOOKS.build(dict(type="StrictLoadHook")).after_load_checkpoint(runner, checkpoint)
    assert checkpoint["meta"] == {}  # where mmengine would look for it afterwards


def test_names_of_wrappers_in_a_checkpoint_reach_mmengine_plain() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    state = nn.DataParallel(nn.Sequential(torch.compile(model[0]))).state_dict()
    checkpoint = {"state_dict": state}
    runner = SimpleNamespace(model=model, _load_from="a.pth")
    HOOKS.build(dict(type="StrictLoadHook")).after_load_checkpoint(runner, checkpoint)
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    assert checkpoint["state_dict"]._metadata["0"] == dict(version=2)


def test_a_checkpoint_must_fit_in_every_entry() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = model.state_dict()
    check_fit(model, {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, "x.pth")
    del state["1.bias"]
    with pytest.raises(WeightsError, match=r"x\.pth: does not fit this model in 1 entries: 1\.bias is missing"):
        check_fit(model, {"state_dict": state}, "x.pth")
    check_fit(model, {"state_dict": state}, "x.pth", may_differ=("1.",))
    assert HOOKS.build(dict(type="StrictLoadHook", may_differ=["1."])).may_differ == ("1.",)


# --- resuming ---


class Noise(BaseDataset):
    """Samples of a width, a height and a random number, which the pipeline draws."""

    def load_data_list(self) -> list[dict]:
        return [dict(width=1 + i % 3, height=2, number=i) for i in range(11)]


def draw(results: dict) -> tuple[int, float]:
    return results["number"], np.random.rand()


def batches(group: type[BatchSampler], workers: int, done: int) -> list:
    """The batches 0 to 9 of a loop that counts iterations, as a runner sees them that has done the first ``done``."""
    torch.manual_seed(done)  # whatever came before
    dataset = Noise(pipeline=[draw])
    sampler = group(InfiniteSampler(dataset, seed=99 + done), batch_size=2, drop_last=False)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
    loop = object.__new__(IterBasedTrainLoop)
    loop.dataloader, loop.dataloader_iterator = loader, _InfiniteDataloaderIterator(loader)
    cfg = Config(dict(train_dataloader=dict(sampler=dict(type="InfiniteSampler"))))
    ExactResumeHook().before_train(SimpleNamespace(train_loop=loop, seed=5, iter=done, cfg=cfg))
    return [next(loop.dataloader_iterator) for _ in range(10)]


@pytest.mark.parametrize("group", [BatchSampler, AspectRatioBatchSampler])
def test_a_resumed_loop_goes_on_with_the_same_images_and_augmentation(group: type[BatchSampler]) -> None:
    expected = batches(group, workers=0, done=0)
    numbers = [sample for batch in expected for sample in batch]
    assert len({number for number, _ in numbers[:11]}) >= 9  # all but those that wait for a partner
    assert len({noise for _, noise in numbers}) == 20
    resumed = batches(group, workers=2, done=4)
    assert resumed[4:] == expected[4:]
    if group is BatchSampler:
        assert resumed[:4] == [None] * 4  # not loaded


# --- missing packages ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "mmdet"}, r"mmdet, which this command needs, is missing: pip install mmdet==3\.3\.0 --force"),
        ({"missing": "mmcv"}, r"mmcv-lite, .* is missing: pip install mmcv-lite==2\.1\.0 --force-reinstall"),
        ({"versions": {"mmcv-lite": "2.2.0"}}, r"mmcv 2\.2\.0 does not fit, 2\.0\.0 <= version < 2\.2\.0 does: "),
        ({"versions": {"mmcv": "1.7.0"}}, r"mmcv 1\.7\.0 does not fit"),  # the compiled one is what is imported
        ({"versions": {"mmengine": "0.7.1"}}, r"mmengine 0\.7\.1 does not fit.*pip install mmengine==0\.10\.7"),
        ({"missing": "pkg_resources"}, r"mmengine imports pkg_resources, .*: pip install 'setuptools<82'"),
        (
            {"import": {"mmcv._ext": ImportError("undefined symbol: x")}},
            r"_ext .*\(undefined symbol: x\): pip uninstall -y mmcv",
        ),
        (
            {"import": {"cv2": ImportError("libGL.so.1")}},
            r"cv2 .*\(libGL\.so\.1\): .* opencv-python-headless",
        ),
        (
            {"import": {"torchvision": RuntimeError("no nms")}},
            r"torchvision cannot be imported \(no nms\): install",
        ),
    ],
)
def test_faulty_packages_get_a_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    def import_module(name: str) -> None:
        if name in change["import"]:
            raise change["import"][name]

    version, find = packages.importlib.metadata.version, packages.find_spec
    versions = change.get("versions", {})
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == change.get("missing") else find(name))
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: versions.get(name) or version(name))
    if "import" in change:
        monkeypatch.setattr(packages.importlib, "import_module", import_module)
    with pytest.raises(packages.SetupError, match=message):
        packages.check_packages("mmdet")


@pytest.mark.parametrize("command", ["detection", "segmentation.complexity", "tools/train.py"])
def test_without_mmengine_a_command_says_so_in_one_line(command: str) -> None:
    start = "run_module('spatial_mamba." + command + "', run_name='__main__')"
    if command.startswith("tools"):
        start = f"run_path({str(ROOT / 'detection' / command)!r}, run_name='__main__')"
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "mmengine" else find_spec(name, *package)
class Finder:
    def find_spec(self, name, *more):
        if name.split(".")[0] == "mmengine":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
sys.argv = ["command", "config.py"]
import spatial_mamba.segmentation.demo_data, spatial_mamba.detection.demo_data  # need none of the packages
runpy.{start}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 2
    install = "pip install mmengine==0.10.7 --force-reinstall --no-deps"  # its metadata are still there
    assert result.stderr == f"error: mmengine, which this command needs, is missing: {install}\n"


def share_buffers(rank: int, folder: Path) -> None:
    """One of two processes: their BatchNorm statistics differ until they evaluate."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(rank + 1)
    HOOKS.build(dict(type="SameBuffersHook")).before_val(SimpleNamespace(model=norm))
    torch.save(norm.running_mean, folder / f"{rank}.pth")


def test_all_processes_evaluate_with_the_buffers_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(share_buffers, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pth").tolist() == [1, 1, 1]


def test_segmentation_needs_no_mmdet_and_detection_no_mmseg() -> None:
    for room, other in (("detection", "mmseg"), ("segmentation", "mmdet")):
        code = f"import sys; sys.modules['{other}'] = None; import spatial_mamba.{room}.prediction"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# --- the tools: train, test, resume, with the scripts of this project and of the packages ---

CRASH = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class CrashHook(Hook):
    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == int(os.environ.get("CRASH_AFTER", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
"""
SMALLER = """
_base_ = "{base}"
custom_imports = dict(imports=["spatial_mamba.{room}", "crash"])
custom_hooks = [
    dict(type="ExactResumeHook"), dict(type="StrictLoadHook"), dict(type="SameBuffersHook"), dict(type="CrashHook")
]
model = dict(backbone=dict(dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.3), {necks})
pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"{annotations})]
pipeline += [dict(type="PhotoMetricDistortion"), dict(type="RandomFlip", prob=0.5), dict(type="Pack{kind}Inputs")]
train_dataloader = dict(batch_size=2, num_workers=1, dataset=dict(data_root="data", pipeline=pipeline))
val_dataloader = dict(batch_size=2, dataset=dict(data_root="data"))
test_dataloader = val_dataloader
{more}
"""


class Room:
    """A folder with a small data set and config, and the results of an undisturbed run of two processes."""

    def __init__(self, folder: Path, name: str, package: str, last: str, metric: str) -> None:
        self.folder, self.name, self.package, self.last, self.metric = folder, name, package, last, metric
        self.tools = ROOT / name / "tools"
        self.stock = Path(sys.modules[package].__file__).parent / ".mim/tools"

    def run(self, *command: object, fails: bool = False, **environment: str) -> str:
        """Run a command in the folder, on the CPU; returns its output."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PORT": str(29500 + os.getpid() % 10000),
            **environment,
        }
        result = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        output = result.stdout + result.stderr
        assert (result.returncode != 0) == fails, output[-3000:]
        return output

    def scores(self, output: str) -> str:
        """The metrics of the last evaluation in an output, as printed."""
        lines = [line for line in output.splitlines() if self.metric in line]
        return re.sub(r"(data_)?time: \S+", "", lines[-1].split("]    ")[1]).strip()


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "crash.py").write_text(CRASH)
    counts = {"train": 12, "val": 5}
    if request.param == "detection":
        write_coco_digits(folder / "data", counts)
        base, room = "mask_rcnn_spatialmamba_fpn_digits.py", Room(folder, "detection", "mmdet", "epoch_3.pth", "mAP:")
        necks = "neck=dict(in_channels=[8, 16, 32, 64])"
        data = dict(kind="Det", annotations=", with_bbox=True, with_mask=True")
        more = "train_cfg = dict(max_epochs=3, val_interval=3)\ntest_evaluator = val_evaluator = "
        more += 'dict(ann_file="data/annotations/instances_val.json")'
    else:
        write_ade_digits(folder / "data", counts)
        base, room = "upernet_spatialmamba_digits.py", Room(folder, "segmentation", "mmseg", "iter_9.pth", "mIoU:")
        norm = "norm_cfg=dict(type='SyncBN')"
        necks = f"decode_head=dict(in_channels=[8, 16, 32, 64], {norm}), auxiliary_head=dict(in_channels=32, {norm})"
        data = dict(kind="Seg", annotations="")
        more = "train_cfg = dict(max_iters=9, val_interval=9)\ndefault_hooks = dict(checkpoint=dict(interval=3))"
    base = ROOT / "configs" / request.param / base
    config = SMALLER.format(base=base, room=request.param, necks=necks, more=more, **data)
    (folder / "small.py").write_text(config)
    room.trained = room.run("bash", room.tools / "dist_train.sh", "small.py", 2, "--work-dir", "undisturbed")
    return room


def tensors(part: object, name: str = "") -> dict[str, Tensor]:
    """All tensors of nested containers, by their place."""
    if isinstance(part, Tensor):
        return {name: part}
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list | tuple) else ()
    return {place: tensor for key, child in items for place, tensor in tensors(child, f"{name}/{key}").items()}


def test_a_killed_run_resumes_to_the_same_state(room: Room) -> None:
    train = "bash", room.tools / "dist_train.sh", "small.py", 2, "--work-dir", "killed"
    # In the second of three parts: after a checkpoint, and with work beyond it that is lost. Without loader processes,
    # which outlive a killed parent; that makes no difference, nor does it to the augmentation.
    workers = "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"
    room.run(*train, "--cfg-options", *workers, fails=True, CRASH_AFTER="5")
    assert not (room.folder / "killed" / room.last).exists()
    output = room.run(*train, "--resume")
    assert re.search(r"resumed epoch: \d, iter: 3", output)
    expected, got = (
        torch.load(room.folder / work / room.last, weights_only=True) for work in ("undisturbed", "killed")
    )
    for part in ("state_dict", "optimizer"):
        one, other = tensors(expected[part]), tensors(got[part])
        assert one.keys() == other.keys()
        assert len(one) > 100
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert expected["param_schedulers"] == got["param_schedulers"]
    assert room.scores(output) == room.scores(room.trained)


def test_the_distributed_test_repeats_the_score_and_draws(room: Room) -> None:
    out = "out.pkl" if room.name == "detection" else "out"
    test = "small.py", f"undisturbed/{room.last}"
    output = room.run("bash", room.tools / "dist_test.sh", *test, 2, "--work-dir", "tested", "--out", out)
    assert room.scores(output) == room.scores(room.trained)
    assert ("2 layers of type SyncBN become BN" in room.trained) == (room.name == "segmentation")  # no GPU
    if room.name == "detection":
        predictions = pickle.loads((room.folder / out).read_bytes())
        assert sorted(p["img_id"] for p in predictions) == [1, 2, 3, 4, 5]
    else:
        assert len(list((room.folder / out).glob("*.png"))) == 5
    more = ["--tta"] if room.name == "segmentation" else []
    output = room.run(
        sys.executable, room.tools / "test.py", *test, "--work-dir", "drawn", "--ddp", "--show-dir", "shown", *more
    )
    assert len(list((room.folder / "shown").rglob("*.png"))) == 5
    assert "--ddp has no effect here" in output


def test_the_packages_own_tools_run_the_config(room: Room) -> None:
    short = "train_cfg.max_epochs=1" if room.name == "detection" else "train_cfg.max_iters=3"
    val = "train_cfg.val_interval=1" if room.name == "detection" else "train_cfg.val_interval=3"
    first = "epoch_1.pth" if room.name == "detection" else "iter_3.pth"
    stock = sys.executable, room.stock / "train.py", "small.py", "--work-dir", "stock", "--cfg-options", short, val
    trained = room.run(*stock)
    tested = room.run(sys.executable, room.stock / "test.py", "small.py", f"stock/{first}", "--work-dir", "stock")
    assert room.scores(tested) == room.scores(trained)


def test_slurm_scripts_hand_on_what_they_are_given(room: Room) -> None:
    (room.folder / "bin").mkdir(exist_ok=True)
    for name, body in (
        ("srun", 'echo "srun $*" >&2; while [[ $1 != python ]]; do shift; done; exec "$@"'),
        ("scontrol", "echo 127.0.0.1"),
    ):
        path = room.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    output = room.run(
        "bash", room.tools / "slurm_test.sh", "part", "job", "small.py", f"undisturbed/{room.last}", "--work-dir", "s",
        PATH=f"{room.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        MASTER_PORT=str(29500 + os.getpid() % 10000),
        GPUS="1", SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_NODELIST="n[1]", SLURM_LOCALID="0",
        SRUN_ARGS="--time=10 --mem=4G",
    )  # fmt: skip
    assert "srun -p part --job-name=job --gres=gpu:1 --ntasks=1 --ntasks-per-node=1" in output
    assert "--time=10 --mem=4G python -u" in output
    assert room.scores(output) == room.scores(room.trained)


def test_wrong_input_gets_one_line(room: Room) -> None:
    (room.folder / "broken.py").write_text("_base_ = 'mmdet::absent.py'")
    (room.folder / "program.py").write_text("model = undefined")
    (room.folder / "empty.pth").write_bytes(b"")
    torch.save(mmengine_checkpoint(), room.folder / "misfit.pth")
    checkpoint = f"undisturbed/{room.last}"
    data = "train_dataloader.dataset.data_root=absent"
    cases = [
        ("train", ["absent.py"], r"absent\.py: no such config; give a path, or one of .*_digits"),
        ("train", ["broken.py"], r"broken\.py: cannot be read as a config \("),
        ("train", ["program.py"], r"program\.py: cannot be read as a config \(NameError: "),
        ("train", ["small.py", "--fast"], r"unrecognized arguments: --fast"),
        ("train", ["small.py", "--cfg-options", "model"], r"--cfg-options takes KEY=VALUE"),
        ("train", ["small.py", "--cfg-options", "model.backbone.frozen_stages=9"], r"frozen_stages must be -1"),
        ("train", ["small.py", "--launcher", "slurm"], r"--launcher slurm: start the processes with"),
        ("train", ["small.py", "--launcher", "pytorch"], r"--launcher pytorch: start the processes with"),
        ("train", ["small.py", "--resume", "absent.pth"], r"absent\.pth: no such checkpoint file"),
        ("train", ["small.py", "--cfg-options", "model.backbone.pretrained=absent.pth"], r"absent\.pth: no such"),
        ("train", ["small.py", "--cfg-options", data], r"No such file or directory: '.*absent"),
        ("train", ["small.py", "--data-path", "absent"], r"No such file or directory: '.*absent"),
        ("train", ["small.py", "--amp"], r"--amp: .* GPU"),
        ("test", ["small.py", "empty.pth"], r"empty\.pth: the file is empty"),
        ("test", ["small.py", "misfit.pth"], r"misfit\.pth: does not fit this model in \d+ entries: "),
        ("test", ["small.py", checkpoint, "--launcher", "boat"], r"argument --launcher: invalid choice: 'boat'"),
    ]
    if room.name == "detection":
        cases.append(("test", ["small.py", checkpoint, "--out", "a.json"], r"--out: a\.json must end in \.pkl"))
        cases.append(("test", ["small.py", checkpoint, "--tta"], r"--tta: small\.py has no tta_model"))
        pool = "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max"
        cases.append(("train", ["small.py", "--cfg-options", pool], r"pool_mode='max' needs mmcv's compiled operators"))
    # All in one process, for each takes seconds to import the packages.
    calls = [(tool, [*arguments, "--work-dir", "wrong"]) for tool, arguments, _ in cases]
    code = "from spatial_mamba.detection.openmmlab.commands import run_command as run\n"
    call = f"run({room.package!r}, 'detection.openmmlab.tools', tool, {room.package!r}, arguments)"
    code += f"for tool, arguments in {calls}: print('status', {call})"
    output = room.run(sys.executable, "-u", "-W", "ignore", "-c", f"import sys; sys.stderr = sys.stdout\n{code}")
    *parts, rest = output.split("status 2\n")
    assert rest == "", output[-2000:]
    for (_, _, message), part in zip(cases, parts, strict=True):
        errors = [line for line in part.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert re.search(message, errors[0]), errors[0]
