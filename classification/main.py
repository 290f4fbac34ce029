"""Train, evaluate or time a Spatial-Mamba classifier."""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.preemption import PreemptedError
from spatial_mamba.classification.settings import SETTINGS, Setting, settings_table
from spatial_mamba.classification.stalls import stalls_watched
from spatial_mamba.classification.trainer import prepare
from spatial_mamba.kernels.command_line import Parser, launched_rank, run_command
from spatial_mamba.kernels.errors import UserError

GROUPS = {"DATA": "data", "MODEL": "model", "TRAIN": "training"}  # of options, by the section of their keys
# Keys in other groups that matter only in training. `evaluate` accepts their options, but does not show them.
TRAINING_KEYS = {
    "DATA.SKIP_UNREADABLE", "MODEL.FINETUNE", "OUTPUT", "TAG", "KEEP_CHECKPOINTS", "SAVE_MINUTES", "SEED",
}  # fmt: skip
# Options of the published trainer that change no result.
IGNORED_OPTIONS = (
    "--ddp", "--enable_persistance", "--enable_preload", "--fused_layernorm", "--fused_window_process",
    "--memory_limit_rate", "--model_ema_force_cpu",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job with the options of the published trainer; returns the exit status."""
    return run_command(_run, _parser("main.py", "--cfg spatialmamba_tiny --data-path imagenet"), argv)


def train(argv: Sequence[str] | None = None) -> int:
    """``spatial-mamba train``."""
    return run_command(_run, _parser("spatial-mamba train", "--cfg spatialmamba_tiny --data-path imagenet"), argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``spatial-mamba evaluate``."""
    example = "--cfg spatialmamba_tiny --data-path imagenet --pretrained spatialmamba_tiny.pth"
    parser = _parser("spatial-mamba evaluate", example, trains=False)
    parser.set_defaults(EVAL_MODE=True)
    return run_command(_run, parser, argv)


def _parser(prog: str, example: str, trains: bool = True) -> Parser:
    """All options. Those in ``SETTINGS`` are stored under their keys; an omitted option is ``None``."""
    parser = Parser(prog, __doc__, example, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML config, or the name of a shipped one")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to override, after the other options"
    )
    parser.add_argument("--list-keys", action=_ListKeys, nargs=0, help="show all keys with their defaults and exit")
    groups = {name: parser.add_argument_group(name) for name in (*GROUPS.values(), "run")}
    for setting in SETTINGS:
        name = GROUPS.get(setting.key.split(".")[0], "run")
        if setting.option and (trains or not (name == "training" or setting.key == "EVAL_MODE")):
            text = setting.help if trains or setting.key not in TRAINING_KEYS else argparse.SUPPRESS
            groups[name].add_argument(*setting.option.split(" "), dest=setting.key, help=text, **_kind(setting))
    groups["run"].add_argument("--disable_amp", "--disable-amp", action="store_true", help="compute in float32")
    groups["run"].add_argument(
        "--throughput", type=int, nargs="*", metavar="BATCH", help="time inference at these batch sizes and stop"
    )
    # torch.distributed.launch passes it; the environment has the same number.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    for option in IGNORED_OPTIONS:
        parser.add_argument(option, nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _kind(setting: Setting) -> dict[str, Any]:
    """The arguments of ``add_argument`` that follow from the default of a setting."""
    if setting.default is False:
        return dict(action="store_true", default=None)
    if setting.default is True:
        return dict(type=_boolean, nargs="?", const=True, metavar=setting.metavar)
    return dict(type=type(setting.default), metavar=setting.metavar)


class _ListKeys(argparse.Action):
    """Prints the table of settings and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(settings_table())
        parser.exit()


def _overrides(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Options as ``(config key, value)``, those of --opts last."""
    given = vars(args)
    pairs = [(setting.key, given[setting.key]) for setting in SETTINGS if given.get(setting.key) is not None]
    if args.disable_amp:
        pairs.append(("AMP_ENABLE", False))
    if args.throughput is not None:
        pairs += [("THROUGHPUT_MODE", True), ("THROUGHPUT_BATCHES", args.throughput)]
    if len(args.opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE; {args.opts[-1]} has no value")
    return pairs + list(zip(args.opts[0::2], args.opts[1::2], strict=True))


def _run(parser: Parser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    config, notes = load_config(args.cfg, _overrides(args))
    ignored = [option for option in IGNORED_OPTIONS if getattr(args, option.removeprefix("--")) is not None]
    with _lost_processes_reported():
        job = prepare(config, [*notes, *(f"command line: {option} has no effect here" for option in ignored)])
        try:
            with stalls_watched(job.process, config.TIMEOUT_MINUTES):
                job.run()
        except PreemptedError as stop:
            job.process.close()
            return stop.status
        job.process.close()
    return 0


@contextmanager
def _lost_processes_reported() -> Iterator[None]:
    """Turn the error that follows the loss of a loader process or another training process into UserError."""
    try:
        yield
    except RuntimeError as error:
        is_one_of_several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        rank = f"process {launched_rank()}: " if is_one_of_several else ""
        if re.search("DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
            raise UserError(
                f"{rank}a loader process was killed, probably because memory ran out; lower --workers or --batch-size, "
                "or give a container more shared memory (--shm-size)"
            ) from error
        # When one process fails, the others lose their connection. The launcher gets time to stop them before their
        # errors bury that one.
        if is_one_of_several:
            time.sleep(5)
        if re.search("Connection (closed|reset)|Broken pipe|[Tt]imed? ?out", str(error)):
            raise UserError(
                f"{rank}another process failed, was killed or does not answer; see its output, or raise "
                "--timeout-minutes if it is only slow"
            ) from error
        raise


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "t", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "f", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
