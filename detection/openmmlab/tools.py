"""The command lines of tools/train.py and tools/test.py, with the flags of OpenMMLab's own tools."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import OPTIMIZERS, RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from ...classification.models.weights import read_checkpoint
from ...kernels.command_line import closest
from ...kernels.errors import UserError
from ...kernels.home import with_home
from .commands import Parser, in_words, other_type
from .data_checks import check_data, leaves
from .processes import prepare_processes, process_count

CONFIGS = Path(__file__).parents[2] / "configs"
# Variables that only have an effect while a config is read, and what to set instead.
VARIABLES = {"data_root": "use --data-path FOLDER"}
VARIABLES |= {name: f"give train_cfg.{name}=N" for name in ("max_epochs", "max_iters")}
VARIABLES |= dict.fromkeys(("pretrained", "checkpoint_file"), "give model.backbone.pretrained=FILE")
FOLDERS = {"mmdet": "detection", "mmseg": "segmentation"}


def load_config(package: str, name: str, options: dict | None = None) -> Config:
    """Read a config, given by its path or by the name of a config of this project.

    Args:
        package: ``mmdet`` or ``mmseg``.
        options: settings to change, by dotted key.

    Raises:
        UserError: if there is no such config, it cannot be read, or it is for another package.
    """
    shipped = CONFIGS / FOLDERS[package]
    name = with_home(name)
    path = next((p for p in (Path(name), shipped / name, shipped / f"{name}.py") if p.is_file()), None)
    if path is None:
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.py")))
        raise UserError(f"{name}: no such config; give a path, or one of {names}")
    try:
        config = Config.fromfile(path)
        known = {*config, *signature(Runner).parameters}
        for key in {option.split(".")[0] for option in options or ()} - known:
            if suggestion := closest(key, known, cutoff=0.8):  # others may be of the user's own code
                raise UserError(f"--cfg-options: {path} has no {key}{suggestion}")
        config.merge_from_dict(options or {})
        _expand_home(config._cfg_dict)
    except UserError:
        raise
    except Exception as error:  # a config is a program
        raise UserError(f"{path}: cannot be read as a config ({type(error).__name__}: {error})") from error
    config.default_scope = config.get("default_scope") or package  # None in configs written as Python modules
    if config.default_scope != package:
        raise UserError(f"{path}: is a config for {config.default_scope}; this command needs one for {package}")
    config.setdefault("launcher", "none")
    return config


def _expand_home(part: Any) -> None:
    """Expand ``~`` at the start of every string in a config, in place; only paths start with it."""
    for key, child in list(part.items() if isinstance(part, dict) else enumerate(part)):
        if isinstance(child, dict | list):
            _expand_home(child)
        elif isinstance(child, str | tuple):
            part[key] = with_home(child)


def train(package: str, argv: Sequence[str] | None = None) -> None:
    """Train with a config of mmdet or mmseg, as the command line asks.

    Raises:
        UserError, WeightsError, OSError: naming what is wrong with options, config, checkpoints or data.
    """
    parser = _common_parser("train.py", f"Train a model of {package}.", "CONFIG --data-path FOLDER --resume")
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="continue from FILE, or the newest in the work folder"
    )
    args = parser.parse_args(argv)
    config = _configure(package, args, "train_dataloader", "train_cfg", "optim_wrapper")
    if not args.auto_scale_lr and "train_dataloader.batch_size" not in (args.cfg_options or {}):
        _keep_total_batch(config)
    if args.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp: mmengine needs a GPU for mixed precision, and PyTorch finds none")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    runner = _build_runner(config)
    if isinstance(runner, Runner):
        check_data(runner, "train", "val")  # builds loops, which its train() would do next
        _check_late_names(runner)
        # Built by its train(): schedulers start from learning rates that --auto-scale-lr has changed in between.
        for name in ("build_optim_wrapper", "build_param_scheduler"):
            setattr(runner, name, _named(config)(getattr(runner, name)))
    runner.train()


def test(package: str, argv: Sequence[str] | None = None) -> None:
    """Test a checkpoint with a config of mmdet or mmseg, as the command line asks.

    Raises:
        UserError, WeightsError, OSError: see ``train``.
    """
    parser = _common_parser("test.py", f"Test a model of {package}.", "CONFIG CHECKPOINT --show-dir FOLDER")
    parser.add_argument("checkpoint", help="checkpoint file")
    what = "pickle file (.pkl) of predictions" if package == "mmdet" else "folder of predicted label maps"
    parser.add_argument("--out", help=f"{what} to write")
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument("--show-dir", metavar="FOLDER", help="write images with predictions drawn over them")
    parser.add_argument("--wait-time", type=float, default=2, metavar="SECONDS", help="time per image of --show")
    parser.add_argument("--tta", action="store_true", help="average over the scales and flips of tta_pipeline")
    parser.add_argument("--ddp", nargs="?", const=True, help=argparse.SUPPRESS)  # an option of the published tool
    args = parser.parse_args(argv)
    config = _configure(package, args, "test_dataloader", "test_cfg", "test_evaluator")
    if args.ddp is not None:
        print_log("--ddp has no effect", "current")
    config.load_from = args.checkpoint
    config.resume = False
    if args.show or args.show_dir:
        _draw_predictions(package, config, args)
    if args.tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise UserError(f"--tta: {args.config} has no tta_model and tta_pipeline")
        for dataset in leaves(config.test_dataloader.dataset):
            dataset.pipeline = config.tta_pipeline
        config.model = {**config.tta_model, "module": config.model}
    if args.out and package == "mmdet":
        if not args.out.endswith((".pkl", ".pickle")):
            raise UserError(f"--out: {args.out} must end in .pkl, for a pickle file of predictions")
    elif args.out:
        evaluators = config.test_evaluator
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            evaluator.update(output_dir=args.out, keep_results=True)
    runner = _build_runner(config)
    if args.out and package == "mmdet":
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    if isinstance(runner, Runner):
        check_data(runner, "test")
    runner.test()


def _common_parser(name: str, description: str, example: str) -> Parser:
    """The options that training and testing share."""
    parser = Parser(name, description, example)
    parser.add_argument("config", help="config file, or the name of one that comes with the package")
    parser.add_argument("--data-path", metavar="FOLDER", help="the data set, instead of the config's data_root")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints; by default work_dirs/CONFIG")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torch.distributed.launch passes it; the environment has the same number.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _configure(package: str, args: argparse.Namespace, *needed: str) -> Config:
    """Read the config and apply the common options.

    Raises:
        UserError: for an option without effect, and a config that cannot be read or lacks one of the needed keys.
    """
    if args.launcher == "pytorch":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    for key in args.cfg_options or ():
        if key in VARIABLES:
            raise UserError(f"--cfg-options {key}: has no effect, since its value was copied; {VARIABLES[key]}")
    config = load_config(package, args.config, args.cfg_options)
    if missing := [key for key in needed if not config.get(key)]:
        raise UserError(f"{args.config}: has no {', '.join(missing)}")
    if args.data_path:
        _move_data(config, args.data_path)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    return config


def _move_data(config: Config, folder: str) -> None:
    """Replace ``data_root`` with another folder in all paths of loaders and evaluators.

    Raises:
        UserError: if the config has no ``data_root``.
    """
    parts = [key for key in config if key.endswith(("_dataloader", "_evaluator"))]
    found = [root for key in ("data_root", *parts) for root in _values({key: config.get(key)}, "data_root")]
    roots = sorted({root for root in found if isinstance(root, str) and root}, key=len, reverse=True)
    if not roots:
        raise UserError(f"--data-path: {config.filename} has no data_root; set the paths with --cfg-options")

    def moved(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: moved(child) for key, child in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(moved(child) for child in part)
        for root in roots if isinstance(part, str) else ():
            if part == root or part.startswith(f"{root.rstrip('/')}/"):
                return f"{folder.rstrip('/')}/{part[len(root) :].lstrip('/')}".rstrip("/")
        return part

    config.merge_from_dict({key: moved(config[key]) for key in parts} | {"data_root": folder})


def _values(part: Any, name: str) -> Iterator[Any]:
    """All values of a key anywhere in a part of a config."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list | tuple) else ()
    for key, child in items:
        yield from [child] if key == name else _values(child, name)


def _keep_total_batch(config: Config) -> None:
    """Distribute the images of an update, given by ``total_batch`` in the config, over the processes.

    ``total_batch`` is ``dict(images=N, processes=P)``. A config whose ``batch_size`` is not N / P keeps it.

    Raises:
        UserError: if the images cannot be distributed evenly.
    """
    total, processes = config.get("total_batch"), process_count(config.launcher)
    if not total or config.train_dataloader.batch_size * total.processes != total.images:
        return
    if total.images % processes:
        fitting = ", ".join(str(n) for n in range(1, total.images + 1) if total.images % n == 0)
        raise UserError(
            f"{processes} processes cannot share the {total.images} images of an update; start {fitting} processes, "
            "or set --cfg-options train_dataloader.batch_size=N"
        )
    images = total.images // processes
    config.train_dataloader.batch_size = images
    print_log(f"total batch {total.images}: {processes} processes with {images} images each", "current")


def _draw_predictions(package: str, config: Config, args: argparse.Namespace) -> None:
    hook = config.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise UserError(f"--show, --show-dir: {args.config} has no default_hooks.visualization")
    if process_count(config.launcher) > 1:
        print_log("--show-dir: only the first process draws, and only its own images; use one process", "current")
    hook.update(draw=True, interval=1, show=args.show, wait_time=args.wait_time)
    if args.show_dir and package == "mmdet":
        hook.test_out_dir = str(Path(args.show_dir).resolve())  # mmdet resolves relative paths in the work folder
    elif args.show_dir:
        config.visualizer.save_dir = args.show_dir


def _build_runner(config: Config) -> Runner:
    """Check the checkpoint and the processes before data sets are read, then build the runner."""
    start = config.load_from or (find_latest_checkpoint(config.work_dir) if config.resume else None)
    if start and "://" not in start:
        read_checkpoint(start)
    prepare_processes(config)
    with _named(config):
        return RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)


def _check_late_names(runner: Runner) -> None:
    """Check names that mmengine looks up late or reports badly: the optimizer's, and the checkpoint hook's options and
    metric.

    Raises:
        UserError: naming one that does not exist.
    """
    kind = (runner.cfg.get("optim_wrapper") or {}).get("optimizer", {}).get("type")
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            raise UserError(f"optim_wrapper.optimizer: there is no {kind}{other_type(kind, registry)}")
    metrics = getattr(getattr(runner.val_loop, "evaluator", None), "metrics", ())
    prefixes = [f"{metric.prefix}/" if metric.prefix else "" for metric in metrics]
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            try:
                signature(runner.save_checkpoint).bind("", "", **hook.args)
            except TypeError as error:
                raise UserError(f"default_hooks.checkpoint: {error}") from error
            for name in hook.save_best or ():
                if prefixes and name != "auto" and not any(prefix in name for prefix in prefixes):
                    raise UserError(f"default_hooks.checkpoint: save_best={name} must start with {prefixes[0]}")


@contextmanager
def _named(config: Config) -> Iterator[None]:
    """Turn the errors of mmengine's registries and of constructors into a UserError that names the config."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config.filename}: {in_words(error)}") from error
