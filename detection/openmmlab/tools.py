"""The command lines of tools/train.py and tools/test.py, with the flags of OpenMMLab's own, for both rooms."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ...classification.models.weights import WeightsError, read_checkpoint
from .packages import SetupError, check_packages
from .processes import launched_rank, prepare_processes

CONFIGS = Path(__file__).parents[2] / "configs"
_ROOMS = {"mmdet": "detection", "mmseg": "segmentation"}
_USER_ERRORS = (SetupError, WeightsError, FileNotFoundError)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as every other wrong input is."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{message} (--help lists the options)")


def train(package: str, argv: Sequence[str] | None = None) -> int:
    """Train by a config of mmdet or mmseg; returns the exit status: 0, or 2 after a line that names what is wrong."""
    return report_errors(_train, package, argv)


def test(package: str, argv: Sequence[str] | None = None) -> int:
    """Test a checkpoint by a config of mmdet or mmseg; returns the exit status as ``train`` does."""
    return report_errors(_test, package, argv)


def load_config(package: str, name: str, options: dict | None = None) -> Config:
    """Read a config, given by its path or by the name of one that comes with the package.

    Args:
        package: ``mmdet`` or ``mmseg``.
        options: settings to change, by dotted key.

    Raises:
        SetupError: if there is no such config, it cannot be read, or it is one for another package.
    """
    shipped = CONFIGS / _ROOMS[package]
    path = next((p for p in (Path(name), shipped / name, shipped / f"{name}.py") if p.is_file()), None)
    if path is None:
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.py")))
        raise SetupError(f"{name}: no such config; give a path, or one of {names}")
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options or {})
    except (SyntaxError, ImportError, KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        raise SetupError(f"{path}: cannot be read as a config ({error})") from error
    scope = config.get("default_scope", package)
    if scope != package:
        raise SetupError(f"{path}: is a config for {scope}; this command needs one for {package}")
    config.setdefault("launcher", "none")
    return config


def report_errors(command: Callable[..., None], *args: object) -> int:
    """Run a command, and turn an error of its user's into one line; returns the exit status."""
    try:
        command(*args)
    except _USER_ERRORS as error:
        # Mostly every process finds the same, and the first one speaks; the launcher then ends the others.
        if launched_rank() > 0:
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _train(package: str, argv: Sequence[str] | None) -> None:
    parser = _common_parser("train.py", f"Train a model of {package}.")
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the total batch")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="continue from FILE, or the newest in the work folder"
    )
    args = parser.parse_args(argv)
    config = _configure(package, args)
    if args.amp:
        if not torch.cuda.is_available():
            raise SetupError("--amp: mmengine trains in mixed precision on a GPU only, and PyTorch finds none here")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise SetupError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    _build_runner(config).train()


def _test(package: str, argv: Sequence[str] | None) -> None:
    parser = _common_parser("test.py", f"Test a model of {package}.")
    parser.add_argument("checkpoint", help="checkpoint file")
    what = "pickle file (.pkl) of predictions" if package == "mmdet" else "folder of predicted label maps"
    parser.add_argument("--out", help=f"{what} to write")
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument("--show-dir", metavar="FOLDER", help="write images with predictions drawn over them")
    parser.add_argument("--wait-time", type=float, default=2, metavar="SECONDS", help="pause of --show")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips, as tta_pipeline says")
    args = parser.parse_args(argv)
    config = _configure(package, args)
    config.load_from = args.checkpoint
    config.resume = False
    if args.show or args.show_dir:
        _draw_predictions(package, config, args)
    if args.tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise SetupError(f"--tta: {args.config} has no tta_model and tta_pipeline")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = {**config.tta_model, "module": config.model}
    if args.out and package == "mmdet":
        if not args.out.endswith((".pkl", ".pickle")):
            raise SetupError(f"--out: {args.out} must end in .pkl, it is a pickle file of predictions")
    elif args.out:
        config.test_evaluator.update(output_dir=args.out, keep_results=True)
    runner = _build_runner(config)
    if args.out and package == "mmdet":
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


def _common_parser(name: str, description: str) -> Parser:
    """What training and testing have in common."""
    parser = Parser(name, description=description)
    parser.add_argument("config", help="config file, or the name of one that comes with the package")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints; by default work_dirs/CONFIG")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torch.distributed.launch passes it; the environment tells the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _configure(package: str, args: argparse.Namespace) -> Config:
    """Read the config with what the common options change in it."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    check_packages(package)
    config = load_config(package, args.config, args.cfg_options)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    return config


def _draw_predictions(package: str, config: Config, args: argparse.Namespace) -> None:
    hook = config.default_hooks.get("visualization")
    if hook is None:
        raise SetupError(f"--show, --show-dir: {args.config} has no default_hooks.visualization")
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) > 1:
        print_log("--show-dir: only the first process draws, its own share; use one process to see all", "current")
    hook.update(draw=True, interval=1, show=args.show, wait_time=args.wait_time)
    if args.show_dir and package == "mmdet":
        hook.test_out_dir = str(Path(args.show_dir).resolve())  # a relative path would lie in the work folder
    elif args.show_dir:
        config.visualizer.save_dir = args.show_dir


def _build_runner(config: Config) -> Runner:
    """Check what can be checked before data sets are read, then build."""
    if config.load_from:
        read_checkpoint(config.load_from)
    prepare_processes(config)
    return RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
