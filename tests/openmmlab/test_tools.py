"""The tools: train, test and resume with the scripts of this project and of the packages; wrong inputs."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

from mmengine.registry import HOOKS

from spatial_mamba.classification.models.weights import read_checkpoint
from spatial_mamba.detection.demo_data import write_digits as write_coco_digits
from spatial_mamba.detection.openmmlab import tools
from spatial_mamba.detection.openmmlab.data_checks import leaves
from spatial_mamba.kernels.errors import UserError
from spatial_mamba.segmentation.demo_data import write_digits as write_ade_digits

from .forking import Forking
from .test_checkpoints import mmengine_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_home_folder_is_expanded_in_configs_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "own.py").write_text("a = dict(b=[dict(root='~/data')], c=('~/x', 1))\nload_from = '~/w.pth'\n")
    config = tools.load_config("mmdet", "~/own.py", {"work_dir": "~/work"})
    assert [config.load_from, config.work_dir] == [str(tmp_path / "w.pth"), str(tmp_path / "work")]
    assert config.a.b[0].root == str(tmp_path / "data") and config.a.c == (str(tmp_path / "x"), 1)
    args = tools._common_parser("train.py", "", "").parse_args(
        ["~/own.py", "--work-dir=~/work", "--cfg-options", "a=~/b"]
    )
    assert [args.config, args.work_dir] == [str(tmp_path / "own.py"), str(tmp_path / "work")]
    assert args.cfg_options == {"a": str(tmp_path / "b")}


def share_buffers(rank: int, folder: Path) -> None:
    """One of two processes, whose BatchNorm statistics differ until they evaluate."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(rank + 1)
    HOOKS.build(dict(type="SameBuffersHook")).before_val(SimpleNamespace(model=norm))
    torch.save(norm.running_mean, folder / f"{rank}.pth")


def test_all_processes_evaluate_with_the_buffers_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(share_buffers, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pth").tolist() == [1, 1, 1]


CRASH = """
import os, signal
from mmengine.config import config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

config.FormatCode = lambda text, **options: (text, None)  # takes seconds, at the start and in every checkpoint


@HOOKS.register_module()
class CrashHook(Hook):
    def after_train_iter(self, runner, **kwargs):
        name = os.environ.get("SIGNAL", "SIGKILL")
        if runner.iter + 1 == int(os.environ.get("CRASH_AFTER", 0)) and (name == "SIGKILL" or runner.rank == 1):
            os.kill(os.getpid(), getattr(signal, name))
"""


SMALLER = """
_base_ = "{base}"
custom_imports = dict(imports=["spatial_mamba.{task}", "crash"])
custom_hooks = [
    dict(type=name) for name in ("ExactResumeHook", "StrictLoadHook", "SameBuffersHook", "PreemptionHook", "CrashHook")
]
model = dict(backbone=dict(dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.3), {heads})
pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"{annotations})]
pipeline += [dict(type="PhotoMetricDistortion"), dict(type="RandomFlip", prob=0.5), dict(type="Pack{kind}Inputs")]
train_dataloader = dict(batch_size=2, num_workers=1, dataset=dict(data_root="data", pipeline=pipeline))
val_dataloader = dict(batch_size=2, dataset=dict(data_root="data"))
test_dataloader = val_dataloader
{more}
"""


# Of mmdet and mmseg.
PARTS = "apis", "datasets", "engine", "evaluation", "models", "visualization"


class Task:
    """A folder with a small data set and config, and the output of an uninterrupted run of two processes.

    A program in a new Python takes seconds to import the packages, so most are forked from one that has done so.
    """

    def __init__(self, folder: Path, name: str, package: str, last: str, metric: str) -> None:
        self.folder, self.name, self.package, self.last, self.metric = folder, name, package, last, metric
        self.tools = ROOT / name / "tools"
        self.stock = Path(sys.modules[package].__file__).parent / ".mim/tools"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.forking = Forking(["timm", *(f"{package}.{part}" for part in PARTS)], folder, self.environment)
        self.fork = self.forking.run

    def run(self, *command: object, fails: bool = False, **environment: str) -> str:
        """Run a command in the folder, on the CPU; returns its output."""
        result = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder, env={**self.environment, "PORT": str(get_free_port()), **environment},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        output = result.stdout + result.stderr
        assert (result.returncode != 0) == fails, output[-3000:]
        return output

    def distribute(self, script: str, *arguments: object, status: int = 0, **environment: str) -> str:
        """Run the tool that a script gives to PyTorch's launcher, in two processes."""
        path = self.script("stub/python", 'printf "%s\\n" "$@"')
        words = self.run("bash", self.tools / script, *arguments, PATH=path, PORT="29511").splitlines()
        place = "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=29511"
        assert words[:7] == ["-m", "torch.distributed.run", *place, "--nproc_per_node=2"]
        return self.fork(*words[7:], processes=2, status=status, **environment)

    def script(self, name: str, body: str) -> str:
        """Write a script that stands in for a command; returns the PATH to find it."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return f"{path.parent}:{self.environment['PATH']}"

    def scores(self, output: str) -> str:
        """The metrics of the last evaluation in an output, as printed."""
        lines = [line for line in output.splitlines() if self.metric in line]
        return re.sub(r"(data_)?time: \S+", "", lines[-1].split("]    ")[1]).strip()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("detection", "segmentation")],
)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "crash.py").write_text(CRASH)
    counts = {"train": 12, "val": 5}
    if request.param == "detection":
        write_coco_digits(folder / "data", counts)
        base, task = "mask_rcnn_spatialmamba_fpn_digits.py", Task(folder, "detection", "mmdet", "epoch_3.pth", "mAP:")
        heads = "neck=dict(in_channels=[8, 16, 32, 64]), roi_head=dict(bbox_head=dict(fc_out_channels=16))"
        data = dict(kind="Det", annotations=", with_bbox=True, with_mask=True")
        more = "train_cfg = dict(max_epochs=3, val_interval=3)\ntest_evaluator = val_evaluator = "
        more += 'dict(ann_file="data/annotations/instances_val.json")'
        more += "\ndefault_hooks = dict(checkpoint=dict(max_keep_ckpts=-1))"
    else:
        write_ade_digits(folder / "data", counts)
        base, task = "upernet_spatialmamba_digits.py", Task(folder, "segmentation", "mmseg", "iter_9.pth", "mIoU:")
        norm = "norm_cfg=dict(type='SyncBN')"
        heads = f"decode_head=dict(in_channels=[8, 16, 32, 64], channels=8, {norm})"
        heads += f", auxiliary_head=dict(in_channels=32, channels=8, {norm})"
        data = dict(kind="Seg", annotations="")
        more = "train_cfg = dict(max_iters=9, val_interval=9)\ndefault_hooks = dict(checkpoint=dict(interval=3))"
    base = ROOT / "configs" / request.param / base
    config = SMALLER.format(base=base, task=request.param, heads=heads, more=more, **data)
    (folder / "small.py").write_text(config)
    with task.forking:
        task.trained = task.distribute("dist_train.sh", "small.py", 2, "--work-dir", "undisturbed")
        yield task


def tensors(part: object, name: str = "") -> dict[str, Tensor]:
    """All tensors of nested containers, by their path."""
    if isinstance(part, Tensor):
        return {name: part}
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list | tuple) else ()
    return {path: tensor for key, child in items for path, tensor in tensors(child, f"{name}/{key}").items()}


def test_a_killed_and_a_preempted_run_resume_to_the_same_state(task: Task) -> None:
    train = "dist_train.sh", "small.py", 2, "--work-dir", "killed"
    # Between two checkpoints, so that some updates are lost. Without loader processes, which would outlive their
    # parent; their number does not change the augmentation.
    workers = "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"
    task.distribute(*train, "--cfg-options", *workers, status=-signal.SIGKILL, CRASH_AFTER="5")
    assert not (task.folder / "killed" / task.last).exists()
    # Within the last epoch, one process gets a signal.
    preempt = dict(CRASH_AFTER="7", SIGNAL="SIGUSR1")
    launch = "bash", task.tools / train[0], *train[1:], "--resume"
    if task.name == "detection":
        output = task.run(*launch, fails=True, **preempt)
        assert re.search(r"exitcode\s+: 75 ", output)
    else:  # the launcher, which both tasks share, runs to the end below
        output = task.distribute(*train, "--resume", status=75, **preempt)
    assert re.search(r"resumed epoch: \d, iter: 3", output)
    assert re.search(r"stopped by a signal; --resume continues this run from \S+/killed/preempted_iter_7\.pth", output)
    assert not (task.folder / "killed" / task.last).exists()
    output = task.run(*launch) if task.name == "segmentation" else task.distribute(*train, "--resume")
    assert re.search(r"resumed epoch: \d, iter: 7", output)
    expected, got = (read_checkpoint(task.folder / work / task.last) for work in ("undisturbed", "killed"))
    for part in ("state_dict", "optimizer"):
        one, other = tensors(expected[part]), tensors(got[part])
        assert one.keys() == other.keys()
        assert len(one) > 100
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert expected["param_schedulers"] == got["param_schedulers"]
    assert task.scores(output) == task.scores(task.trained)


def test_the_distributed_test_repeats_the_score(task: Task) -> None:
    out = "out.pkl" if task.name == "detection" else "out"
    test = "small.py", f"undisturbed/{task.last}", 2, "--work-dir", "tested", "--out", out
    output = task.distribute("dist_test.sh", *test)
    assert task.scores(output) == task.scores(task.trained)
    assert ("2 layers of type SyncBN become BN" in task.trained) == (task.name == "segmentation")  # no GPU
    if task.name == "detection":
        predictions = pickle.loads((task.folder / out).read_bytes())
        assert sorted(p["img_id"] for p in predictions) == [1, 2, 3, 4, 5]
    else:
        assert len(list((task.folder / out).glob("*.png"))) == 5


def test_the_packages_own_tools_run_the_config(task: Task) -> None:
    short = "train_cfg.max_epochs=1" if task.name == "detection" else "train_cfg.max_iters=3"
    val = "train_cfg.val_interval=1" if task.name == "detection" else "train_cfg.val_interval=3"
    first = "epoch_1.pth" if task.name == "detection" else "iter_3.pth"
    train = [f"{task.stock}/train.py", "small.py", "--work-dir", "stock", "--cfg-options", short, val]
    test = [f"{task.stock}/test.py", "small.py", f"stock/{first}", "--work-dir", "stock"]
    trained, tested = task.fork(*train), task.fork(*test)
    assert task.scores(tested) == task.scores(trained)


def test_slurm_scripts_pass_on_their_arguments_and_pictures_are_drawn(task: Task) -> None:
    task.script("bin/srun", 'echo "srun $*" >&2; while [[ $1 != python ]]; do shift; done; exec "$@"')
    path = task.script("bin/scontrol", "echo 127.0.0.1")
    more = ["--tta"] if task.name == "segmentation" else []
    output = task.run(
        "bash", task.tools / "slurm_test.sh", "part", "job", "small.py", f"undisturbed/{task.last}", "--work-dir", "s",
        "--ddp", "--show-dir", "shown", *more,
        PATH=path,
        MASTER_PORT=str(get_free_port()),
        GPUS="1", SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_NODELIST="n[1]", SLURM_LOCALID="0",
        SRUN_ARGS="--time=10 --mem=4G",
    )  # fmt: skip
    assert "srun -p part --job-name=job --gres=gpu:1 --ntasks=1 --ntasks-per-node=1" in output
    assert "--time=10 --mem=4G python -u" in output
    assert "--ddp has no effect" in output
    assert (task.scores(output) == task.scores(task.trained)) == (not more)  # several scales score differently
    assert len(list((task.folder / "shown").rglob("*.png"))) == 5


def copied(source: Path, target: Path, change: Callable[[Path], object]) -> None:
    """Copy a folder, and change all of its files."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        change(path)


def test_data_sets_are_found_in_wrappers() -> None:
    inner = [{"type": "A"}, {"type": "B", "dataset": {"type": "C"}}]
    config = {"type": "RepeatDataset", "dataset": {"type": "ConcatDataset", "datasets": inner}}
    assert [dataset["type"] for dataset in leaves(config)] == ["A", "C"]


def test_a_config_without_scope_is_for_the_package_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("default_scope = None")
    assert tools.load_config("mmseg", str(tmp_path / "own.py")).default_scope == "mmseg"


def test_a_misspelt_setting_does_not_remain_without_effect() -> None:
    name = "mask_rcnn_spatialmamba_fpn_digits"
    with pytest.raises(UserError, match=r"has no train_dataloder; did you mean train_dataloader\?"):
        tools.load_config("mmdet", name, {"train_dataloder.batch_size": 2})
    assert tools.load_config("mmdet", name, {"own.key": 2, "resume": True}).own.key == 2


def test_wrong_input_gets_one_line(task: Task) -> None:
    (task.folder / "broken.py").write_text("_base_ = 'mmdet::absent.py'")
    (task.folder / "program.py").write_text("model = undefined")
    (task.folder / "empty.pth").write_bytes(b"")
    other = "_base_ = 'small.py'\ntrain_dataloader = test_dataloader = dict(dataset={})"
    (task.folder / "few.py").write_text(other.format("dict(metainfo=dict(classes=('0', '1')))"))
    empty = "dict(img_suffix='.bmp')"
    if task.name == "detection":  # no category has these names
        empty = "dict(metainfo=dict(classes=tuple('abcdefghij')), filter_cfg=dict(filter_empty_gt=True))"
    (task.folder / "none.py").write_text(other.format(empty))
    (task.folder / "text.py").write_text(other.format("dict(metainfo=dict(classes='0'))"))
    (task.folder / "misspelt.py").write_text(other.format("dict(metainfo=dict(classes=('zero', *'123456789')))"))
    (task.folder / "order.py").write_text(other.format("dict(metainfo=dict(classes=tuple('1023456789')))"))
    torch.save(mmengine_checkpoint(), task.folder / "misfit.pth")
    checkpoint = f"undisturbed/{task.last}"
    data = "train_dataloader.dataset.data_root=absent"
    heads = ("decode_head", "auxiliary_head")
    if task.name == "detection":
        heads = ("roi_head.bbox_head", "roi_head.mask_head")
    fewer = f"model.{heads[1]}.num_classes=5"
    few = "Dataset of train_dataloader has 2 classes, but "
    few += ", ".join(rf"model\.{head}\.num_classes is 1[01]" for head in heads) + ": set"
    cases = [
        ("train", ["absent.py"], r"absent\.py: no such config; give a path, or one of .*_digits"),
        ("train", ["small.py", "--cfg-options", data], r"No such file or directory: '.*absent"),
        ("test", ["small.py", "misfit.pth"], r"misfit\.pth: does not fit this model in \d+ entries: "),
        ("train", ["few.py"], few),
        ("test", ["few.py", checkpoint], few.replace("train", "test")),
        (
            "train",
            ["small.py", "--cfg-options", fewer],
            rf"but model\.{heads[1]}\.\w+ is 5: set",
        ),
        ("train", ["text.py"], r"metainfo\.classes is the text '0'; .* \('0',\)"),
        ("train", ["small.py", "--cfg-options", "train_cfg=None"], r"small\.py: has no train_cfg"),
        ("train", ["none.py"], r"train_dataloader \(\S+Dataset, .*\): no images remain; check"),
    ]
    if task.name == "detection":  # both tasks share the code of these checks
        pool = "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max"
        (task.folder / "data/annotations/cut.json").write_text('{"images": [')
        annotations = "train_dataloader.dataset.ann_file=annotations/cut.json"
        copied(task.folder / "data/train", task.folder / "data/cut", lambda path: path.write_bytes(b"cut"))
        images = "train_dataloader.dataset.data_prefix.img=cut/"
        boxes = (task.folder / "data/annotations/instances_train.json").read_text()
        (task.folder / "data/annotations/boxes.json").write_text(boxes.replace("segmentation", "unknown"))
        cases += [
            ("train", ["misspelt.py"], r"of train_dataloader: \S+json has 9 of the 10 names in metainfo\.classes"),
            ("test", ["order.py", checkpoint], r"classes must be in the order of its annotation file: \['0', '1', "),
            (
                "train",
                ["small.py", "--cfg-options", "train_dataloader.dataset.ann_file=annotations/boxes.json"],
                r"^error: \S+/\d+\.png: an annotation has no 'mask' to load",
            ),
            ("train", ["broken.py"], r"broken\.py: cannot be read as a config \("),
            ("train", ["program.py"], r"program\.py: cannot be read as a config \(NameError: "),
            ("train", ["small.py", "--fast"], r"unrecognized arguments: --fast"),
            ("train", ["small.py", "--cfg-options", "model"], r"--cfg-options takes KEY=VALUE"),
            ("train", ["small.py", "--cfg-options", "model.backbone.frozen_stages=9"], r"frozen_stages must be -1"),
            ("train", ["small.py", "--launcher", "slurm"], r"--launcher slurm: start the processes with"),
            ("train", ["small.py", "--launcher", "pytorch"], r"--launcher pytorch: start the processes with"),
            ("train", ["small.py", "--resume", "absent.pth"], r"absent\.pth: no such checkpoint file"),
            ("train", ["small.py", "--cfg-options", "model.backbone.pretrained=absent.pth"], r"absent\.pth: no such"),
            ("train", ["small.py", "--data-path", "absent"], r"No such file or directory: '.*absent"),
            ("train", ["small.py", "--amp"], r"--amp: .* GPU"),
            ("train", ["small.py", "--cfg-options", "model.backbone.frozen_stages=two"], r"frozen_stages .* got 'two'"),
            *(
                ("train", ["small.py", "--cfg-options", option], message)
                for option, message in {
                    "optim_wrapper.type=Optimwrapper": r"small\.py: Optimwrapper is not .* registry; .* OptimWrapper\?",
                    "custom_hooks.0.type=FreezeHook": r"FreezeHook is not .*hook registry; .* need custom_imports",
                    "optim_wrapper.optimizer.type=Adamw": r"optim_wrapper\.optimizer: there is no Adamw; .* AdamW\?",
                    "default_hooks.checkpoint.save_best=bbox_mAP": r"save_best=bbox_mAP must start with coco/",
                    "param_scheduler.0.type=LinearL": r"LinearL is not in the .* registry; did you mean LinearLR\?",
                    "param_scheduler.0.start=1": r"small\.py: TypeError: .* argument 'start'",
                    "default_hooks.checkpoint.intervals=1": r"checkpoint: got an .* argument 'intervals'",
                    "model.neck.num_outs=1": r"AssertionError: assert num_outs >= ",
                }.items()
            ),
            (
                "train",
                ["small.py", "--cfg-options", "train_cfg.max_epoch=1"],
                r"TypeError: .*'max_epoch'",
            ),
            ("train", ["small.py", "--cfg-options", "data_root=a"], r"data_root: has no effect.* --data-path"),
            ("train", ["small.py", "--cfg-options", annotations], r"ann_file annotations/cut\.json.*: JSONDecodeError"),
            ("train", ["small.py", "--cfg-options", images], r"^error: AssertionError: failed to load image: .*cut/0"),
            ("test", ["small.py", "empty.pth"], r"empty\.pth: the file is empty"),
            ("test", ["small.py", checkpoint, "--data-path", "absent"], r"No such file or directory: '.*absent"),
            ("test", ["small.py", checkpoint, "--launcher", "boat"], r"argument --launcher: invalid choice: 'boat'"),
            ("test", ["small.py", checkpoint, "--out", "a.json"], r"--out: a\.json must end in \.pkl"),
            ("test", ["small.py", checkpoint, "--tta"], r"--tta: small\.py has no tta_model"),
            ("train", ["small.py", "--cfg-options", pool], r"pool_mode='max' needs mmcv's compiled operators"),
        ]
    else:
        labels = task.folder / "data/annotations/training"
        copied(labels, task.folder / "data/high", lambda path: Image.open(path).point(lambda _: 200).save(path))
        copied(labels, task.folder / "data/rgb", lambda path: Image.open(path).convert("RGB").save(path))
        copied(labels, task.folder / "data/cut", lambda path: path.write_bytes(b"cut"))
        high, rgb, cut = (f"train_dataloader.dataset.data_prefix.seg_map_path={x}" for x in ("high", "rgb", "cut"))
        cases += [
            (
                "train",
                ["small.py", "--cfg-options", high],
                r"^error: \S+/high/\d+\.png: has the label 199 .*, but .* 11",
            ),
            (
                "train",
                ["small.py", "--cfg-options", "train_dataloader.batch_size=1"],
                r"of one image; set .*batch_size",
            ),
            (
                "train",
                ["small.py", "--resume", checkpoint, "--cfg-options", "model.backbone.frozen_stages=1"],
                r"loaded state dict .*: --resume needs the same frozen stages",
            ),
            ("train", ["small.py", "--cfg-options", cut], r"^error: \S+/cut/\d+\.png: cannot be read \("),
            ("train", ["small.py", "--cfg-options", rgb], r"^error: \S+/rgb/\d+\.png: has shape \(\d+, \d+, 3\), but"),
        ]
    calls = [(tool, [*arguments, "--work-dir", "wrong"]) for tool, arguments, _ in cases]
    code = "from spatial_mamba.detection.openmmlab.commands import run_command as run\n"
    call = f"run({task.package!r}, 'detection.openmmlab.tools', tool, {task.package!r}, arguments)"
    code += f"for tool, arguments in {calls}: print('status', {call})"
    (task.folder / "calls.py").write_text(code)
    output = task.fork("calls.py")
    *parts, rest = output.split("status 2\n")
    assert rest == "", output[-2000:]
    for (_, _, message), part in zip(cases, parts, strict=True):
        errors = [line for line in part.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert re.search(message, errors[0]), errors[0]
