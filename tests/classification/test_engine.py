"""Updates whose loss is not finite."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spatial_mamba.classification import trainer
from spatial_mamba.classification.checkpoint import LATEST
from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .runs import options, records


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> None:
    """Feed the model NaN in the chosen training steps, as after an overflow."""
    steps = itertools.count()

    class Poisoned(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, process: Process) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images * float("nan") if is_bad(next(steps)) else images)

    monkeypatch.setattr(trainer, "_parallel", Poisoned)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_non_finite_updates_are_skipped_and_counted(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    poison(monkeypatch, lambda step: step in (1, 3))
    more = ["--amp-dtype", "float16", "--seed", "3", "--opts", "AMP_ENABLE", "True"] if precision == "float16" else []
    assert main(options(micro, photos, tmp_path, *more)) == 0
    folder = tmp_path / "micro/default"
    assert [record["skipped_updates"] for record in records(folder)] == [2, 0]
    checkpoint = read_checkpoint(folder / LATEST)
    for state in (checkpoint["model"], checkpoint["model_ema"]):
        assert all(torch.isfinite(tensor).all() for tensor in state.values()), "running statistics included"
    if precision == "float16":
        assert checkpoint["scaler"]["scale"] == 2.0**16 / 4, "the loss scale was halved twice"


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    micro: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, lambda step: step >= 6)  # all of the second epoch
    assert main(options(micro, photos, tmp_path, "--opts", "TRAIN.MAX_SKIPPED_UPDATES", "4")) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: 4 updates in a row had a non-finite loss") and "\n" not in error
    assert read_checkpoint(tmp_path / "micro/default" / LATEST)["epoch"] == 0
