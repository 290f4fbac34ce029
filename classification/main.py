"""Command line of the ImageNet trainer: train, evaluate or time a Spatial-Mamba classifier."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from spatial_mamba.classification.command_line import Parser
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.distributed import launched_rank
from spatial_mamba.classification.engine import DivergenceError
from spatial_mamba.classification.errors import InputError
from spatial_mamba.classification.models import WeightsError
from spatial_mamba.classification.trainer import prepare

USER_ERRORS = (InputError, WeightsError, DivergenceError)


def build_parser() -> Parser:
    """All options; those left out are ``None`` and leave the config as it is."""
    parser = Parser("main.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML config, or the name of one that comes with the package")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to override, after the other options")
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", help="folder with the train and val splits")
    data.add_argument("--batch-size", type=int, help="images per process and step")
    data.add_argument("--zip", action="store_true", default=None, help="read train.zip and val.zip")
    data.add_argument("--cache-mode", help="encoded images kept in memory: no, full, or part (of a zip, per process)")
    data.add_argument("--workers", type=int, help="loader processes per process")
    data.add_argument("--skip-unreadable", action="store_true", default=None, help="count damaged training images")
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained", metavar="FILE", help="start from these weights; their accuracy comes first")
    model.add_argument("--finetune", action="store_true", default=None, help="allow a new classifier on --pretrained")
    model.add_argument("--resume", metavar="FILE", help="continue from this checkpoint")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int)
    train.add_argument("--optim", help="optimiser, by timm's name")
    train.add_argument("--accumulation-steps", type=int, help="steps whose gradients make one update")
    train.add_argument("--use-checkpoint", action="store_true", default=None, help="recompute activations")
    train.add_argument("--model_ema", "--model-ema", type=_boolean, nargs="?", const=True, metavar="BOOL")
    train.add_argument("--model_ema_decay", "--model-ema-decay", type=float)
    train.add_argument("--disable_amp", "--disable-amp", action="store_true", help="train in float32")
    train.add_argument("--amp-dtype", help="auto, bfloat16 or float16")
    train.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    train.add_argument("--seed", type=int)
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="FOLDER", help="root of the results: OUTPUT/MODEL.NAME/TAG")
    run.add_argument("--tag", help="name of this experiment")
    run.add_argument("--device", help="auto, cuda or cpu")
    run.add_argument("--eval", action="store_true", default=None, help="evaluate --pretrained (or --resume) and stop")
    run.add_argument(
        "--throughput", type=int, nargs="*", metavar="BATCH", help="time inference at these batch sizes and stop"
    )
    # torch.distributed.launch passes it; the environment tells the same.
    run.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    for option in IGNORED_OPTIONS:
        run.add_argument(option, nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


# Options of the published trainer that change no result.
IGNORED_OPTIONS = (
    "--ddp", "--enable_persistance", "--enable_preload", "--fused_layernorm", "--fused_window_process",
    "--memory_limit_rate", "--model_ema_force_cpu",
)  # fmt: skip


# Which config key an option sets; options that need more than that are treated in overrides().
OPTION_KEYS = {
    "data_path": "DATA.DATA_PATH",
    "batch_size": "DATA.BATCH_SIZE",
    "zip": "DATA.ZIP_MODE",
    "cache_mode": "DATA.CACHE_MODE",
    "workers": "DATA.NUM_WORKERS",
    "skip_unreadable": "DATA.SKIP_UNREADABLE",
    "pretrained": "MODEL.PRETRAINED",
    "finetune": "MODEL.FINETUNE",
    "resume": "MODEL.RESUME",
    "epochs": "TRAIN.EPOCHS",
    "optim": "TRAIN.OPTIMIZER.NAME",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "model_ema": "TRAIN.MODEL_EMA",
    "model_ema_decay": "TRAIN.MODEL_EMA_DECAY",
    "amp_dtype": "AMP_DTYPE",
    "compile": "COMPILE",
    "seed": "SEED",
    "output": "OUTPUT",
    "tag": "TAG",
    "device": "DEVICE",
    "eval": "EVAL_MODE",
}


def overrides(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Options as ``(config key, value)``, those of --opts last."""
    pairs = [(key, value) for name, key in OPTION_KEYS.items() if (value := getattr(args, name)) is not None]
    if args.disable_amp:
        pairs.append(("AMP_ENABLE", False))
    if args.throughput is not None:
        pairs += [("THROUGHPUT_MODE", True), ("THROUGHPUT_BATCHES", args.throughput)]
    if len(args.opts) % 2:
        raise InputError(f"--opts takes pairs of KEY VALUE; {args.opts[-1]} has no value")
    return pairs + list(zip(args.opts[0::2], args.opts[1::2], strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status: 0, or 2 after one line that names what is wrong."""
    try:
        args = build_parser().parse_args(argv)
        config, notes = load_config(args.cfg, overrides(args))
        ignored = [option for option in IGNORED_OPTIONS if getattr(args, option.removeprefix("--")) is not None]
        job = prepare(config, [*notes, *(f"command line: {option} has no effect here" for option in ignored)])
    except USER_ERRORS as error:
        # Mostly every process finds the same, and the main one speaks; the launcher then stops the others. One that
        # is still here after the wait has found something of its own.
        if launched_rank() > 0:
            time.sleep(5)
        _report(error)
        return 2
    try:
        job.run()
    except DivergenceError as error:  # comes to all processes at once
        if job.process.is_main:
            _report(error)
        return 2
    except USER_ERRORS as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError:
        # Where one process ends with an error the others lose their connection. Give the launcher time to end them
        # before they bury that one line under their tracebacks.
        if job.process.world_size > 1:
            time.sleep(5)
        raise
    job.process.close()
    return 0


def _report(error: Exception) -> None:
    # An error from a loader's worker arrives with the worker's traceback in front of it.
    line = str(error).strip().splitlines()[-1]
    line = line.split(f"{InputError.__module__}.{InputError.__qualname__}: ")[-1]
    print(f"error: {line}", file=sys.stderr)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "t", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "f", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
