"""Signals: the state is saved within an epoch, and the resumed run ends with the same bits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spatial_mamba.classification import engine, trainer
from spatial_mamba.classification.checkpoint import LATEST
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint
from spatial_mamba.classification.preemption import SIGNALS
from spatial_mamba.classification.trainer import prepare

from .runs import after_calls, assert_same, options, records


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("function", "count", "number", "status"),
    [
        ("_update", 2, signal.SIGTERM, 75),
        ("_update", 6, signal.SIGUSR1, 75),
        ("_update", 9, signal.SIGINT, 130),
        ("validation", 1, signal.SIGTERM, 75),
        ("validation", 2, signal.SIGTERM, 75),
    ],
)
def test_a_signal_saves_and_the_run_continues_to_the_same_bits(
    function: str, count: int, number: int, status: int, trained: Path, micro: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """In the first epoch and the second, between updates and during validation."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        module, name = (engine, "_update") if function == "_update" else (trainer, "progress_of")
        after_calls(patch, module, name, count, send(number))
        assert main(options(micro, photos, tmp_path)) == status
    assert "stopped by a signal; the same command continues this run" in capfd.readouterr().out
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    folder = tmp_path / "micro" / "default"
    updates = (count - 1) % 6 + 1 if function == "_update" else 6
    assert read_checkpoint(folder / LATEST)["progress"][0]["totals"]["updates"] == updates
    assert main(options(micro, photos, tmp_path)) == 0

    a, b = (read_checkpoint(run / LATEST) for run in (trained, folder))
    assert a.pop("config")["OUTPUT"] != b.pop("config")["OUTPUT"]
    assert_same(a, b)
    lines = records(folder)
    assert len(lines) == 2
    for line in lines:  # an epoch resumed after its last update has trained no image since
        assert line["images_per_second"] == pytest.approx(24 / line["train_seconds"])
        assert 0 < line["data_seconds"] < line["train_seconds"]


def test_a_second_ctrl_c_stops_at_once(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    after_calls(monkeypatch, engine, "_update", 2, twice)
    assert main(options(micro, photos, tmp_path)) == 130
    assert "interrupted" in capfd.readouterr().err
    assert not (tmp_path / "micro/default" / LATEST).exists()


def test_checkpoints_within_an_epoch(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that saves after every update and dies continues to the same bits."""
    folder = tmp_path / "micro" / "default"
    arguments = options(micro, photos, tmp_path, "--save-minutes", "1e-9")

    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        after_calls(patch, engine, "_update", 4, die)
        with pytest.raises(MemoryError):
            main(arguments)
    assert read_checkpoint(folder / LATEST)["progress"][0]["totals"]["updates"] == 3
    assert main(arguments) == 0
    assert_same(*(read_checkpoint(run / LATEST)["model"] for run in (trained, folder)))


def test_another_number_of_processes_continues_at_the_same_image(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if two processes had saved: their buffers are averaged, and the updates counted in images."""
    with monkeypatch.context() as patch:
        after_calls(patch, engine, "_update", 4, send(signal.SIGTERM))
        assert main(options(micro, photos, tmp_path)) == 75
    folder = tmp_path / "micro" / "default"
    content = read_checkpoint(folder / LATEST)
    (own,) = content["progress"]
    other = {"totals": own["totals"], "buffers": {name: 3 * buffer for name, buffer in own["buffers"].items()}}
    content["environment"]["processes"] = 2
    torch.save({**content, "progress": [own, other]}, folder / LATEST)
    job = prepare(*load_config(micro, [("DATA.DATA_PATH", str(photos)), ("OUTPUT", str(tmp_path))]))
    for name, buffer in job.state.model.named_buffers():
        torch.testing.assert_close(buffer, 2 * own["buffers"][name])
    job.run()
    log = (folder / "log.txt").read_text()
    assert "the run continues, but not bit for bit (processes 2, now 1)" in log
    assert "in epoch 1, after 4 of its updates" in log
