"""Training, evaluation and resumption, in one process."""

import functools
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from spatial_mamba import SpatialMamba
from spatial_mamba.classification import engine, run_log, stalls, trainer
from spatial_mamba.classification.checkpoint import BEST_EMA, LATEST
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .published import published_checkpoint
from .runs import accuracy_lines, assert_same, full_disk, options, records


def test_unreadable_training_images_are_skipped_and_counted_on_request(
    photos: Path, micro: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    victim = sorted((broken / "train" / "1").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:40])
    arguments = options(micro, broken, tmp_path / "out", "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0")
    assert main([*arguments, "DATA.SKIP_UNREADABLE", "True", "DATA.BATCH_SIZE", "26"]) == 0
    [record] = records(tmp_path / "out/micro/default")
    assert record["unreadable_images"] == 1


def test_a_run_leaves_its_records(trained: Path) -> None:
    lines = records(trained)
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["skipped_updates"] == 0 and line["train_loss"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["val_acc1"] <= line["val_acc5"] <= 100 and 0 <= line["ema_acc1"] <= 100
    assert lines[1]["updates"] == 2 * (27 // 4)
    saved = CfgNode.load_cfg((trained / "config.yaml").read_text())
    assert saved.TRAIN.EPOCHS == 2 and saved.AUG.MESA == 1.0
    assert "epoch 2/2" in (trained / "log.txt").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_second", "train/data_time",
            "val/acc1", "ema/acc1"} <= set(events.Tags()["scalars"])  # fmt: skip
    assert len(events.Scalars("train/loss")) == 12


def test_accumulation_and_activation_checkpointing(micro: Path, photos: Path, tmp_path: Path) -> None:
    """Two steps make one update; recomputed activations change nothing."""
    more = ("--accumulation-steps", "2", "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0")
    assert main(options(micro, photos, tmp_path / "a", *more)) == 0
    assert main(options(micro, photos, tmp_path / "b", "--use-checkpoint", *more)) == 0
    a, b = (read_checkpoint(tmp_path / name / "micro" / "default" / LATEST) for name in "ab")
    assert a["steps"] == 27 // 4 // 2
    assert_same(a["model"], b["model"])


def test_pretrained_weights_are_evaluated_first(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = options(micro, photos, tmp_path, "--pretrained", str(trained / BEST_EMA), "--epochs", "1")
    assert main([*arguments, "--opts", "TRAIN.WARMUP_EPOCHS", "0"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "acc@1" in line]
    best = max(record["ema_acc1"] for record in records(trained))
    assert str(trained / BEST_EMA) in lines[0] and f"EMA   acc@1 {best:.3f}%" in lines[1]
    assert "epoch 1/1" in lines[2]


def test_throughput_is_printed_for_each_batch_size(
    micro: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "measure_throughput", functools.partial(engine.measure_throughput, seconds=0.0))
    before = stalls._progress
    assert main(["--cfg", str(micro), "--throughput", "2", "1"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "throughput" in line]
    assert [line.split("batch ")[1].split(",")[0] for line in lines] == ["1", "2"]
    assert all("images/s" in line and "peak memory" in line for line in lines)
    assert stalls._progress >= before + 2 * 4  # otherwise several processes would seem to have stalled


def test_a_published_runs_folder_is_resumed(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "micro" / "20240923").mkdir(parents=True)
    path = published_checkpoint(trained, tmp_path / "micro" / "20240923" / "latest_ckpt.pth")
    flags = ["--fused_layernorm", "--model_ema_force_cpu", "False", "--memory_limit_rate", "0.9", "--ddp", "torch"]
    flags += ["--enable_preload", "--enable_persistance", "--model_ema", "t"]
    assert main(options(micro, photos, tmp_path, "--tag", "20240923", *flags)) == 0
    output = capfd.readouterr().out
    assert f"resumed from {path} after epoch 2" in output
    ignored = ("fused_layernorm", "model_ema_force_cpu", "memory_limit_rate", "ddp", "enable_preload")
    assert all(f"command line: --{option} has no effect here" in output for option in ignored)


def test_pretrained_weights_are_evaluated_before_resuming(
    continued: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)
    other = SpatialMamba(dims=4, depths=(1, 1, 1, 1), num_classes=3)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    command = options(micro, photos, tmp_path, "--pretrained", str(tmp_path / "other.pth"))
    assert main([*command, "--eval"]) == 0
    [alone] = accuracy_lines(capfd.readouterr().out)
    before = read_checkpoint(continued / LATEST)
    assert main(command) == 0
    output = capfd.readouterr().out
    assert accuracy_lines(output)[0] == alone
    assert output.index("other.pth: model") < output.index("resumed from")
    assert "training does not start from --pretrained" in output and "this run is finished" in output
    assert_same(before["model"], read_checkpoint(continued / LATEST)["model"])


def test_resuming_reports_changes_and_keeps_the_records(
    continued: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    more = ("--epochs", "3", "--opts", "TRAIN.WEIGHT_DECAY", "0.1", "DATA.BATCH_SIZE", "6")
    assert main(options(micro, photos, tmp_path, *more)) == 0
    log = (continued / "log.txt").read_text()
    assert "TRAIN.WEIGHT_DECAY was 0.05 when it was saved and is now 0.1" in log
    assert "it has made 12 updates" in log and "they would be 8" in log
    assert [record["epoch"] for record in records(continued)] == [0, 1, 2]
    assert read_checkpoint(continued / LATEST)["steps"] == 3 * (27 // 6)


def test_resuming_keeps_the_last_epoch_in_tensorboard(
    continued: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(options(micro, photos, tmp_path, "--epochs", "3")) == 0
    scalars = EventAccumulator(str(continued)).Reload().Scalars("val/acc1")
    assert [scalar.step for scalar in scalars] == [6, 12, 18]


def test_two_runs_cannot_write_to_one_folder(
    continued: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    script = "import fcntl, sys; fcntl.lockf(sys.stdout, fcntl.LOCK_EX); print(file=sys.stderr, flush=True); input()"
    with (continued / ".lock").open("w") as file:
        holder = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=file, stderr=-1)
    with holder:
        assert holder.stderr and holder.stderr.readline()
        assert main(options(micro, photos, tmp_path, "--epochs", "3")) == 2
        holder.kill()
    assert "another training run writes here" in capfd.readouterr().err
    assert read_checkpoint(continued / LATEST)["epoch"] == 1


def test_records_that_cannot_be_written_do_not_end_a_run(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """On a full disk, log file, TensorBoard and metrics are given up with one line each; checkpoints are not."""
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "add_scalar", full_disk)
    monkeypatch.setattr(logging.StreamHandler, "flush", full_disk)
    monkeypatch.setattr(run_log.json, "dumps", full_disk)
    assert main(options(micro, photos, tmp_path)) == 0
    output = capfd.readouterr()
    assert output.out.count("cannot be written any more") == 3 and not output.err
    assert read_checkpoint(tmp_path / "micro/default" / LATEST)["epoch"] == 1
