"""Twenty updates of the trainer equal those of the published one, in float64 (``data/golden/trajectory.npz``).

The run goes through the trainer's own parts: optimiser groups, schedule, clipping, EMA and MESA.
"""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from spatial_mamba.classification.checkpoint import EpochTotals, TrainingState
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.distributed import Process
from spatial_mamba.classification.engine import TrainingRun, train_one_epoch
from spatial_mamba.classification.optim import build_criterion, build_optimizer, build_scheduler
from spatial_mamba.classification.run_log import RunLog
from spatial_mamba.classification.trainer import build_model

from .micro_models import GOLDEN, golden_fill

pytestmark = pytest.mark.xdist_group("trajectory")

EPOCHS, UPDATES, BATCH, CLASSES = 4, 5, 4, 10
SETTINGS = {
    "MODEL.SPATIAL_MAMBA.EMBED_DIM": 32,
    "MODEL.SPATIAL_MAMBA.DEPTHS": [1, 1, 2, 1],
    "MODEL.DROP_PATH_RATE": 0.0,
    "DATA.BATCH_SIZE": BATCH,
    "TRAIN.EPOCHS": EPOCHS,
    "TRAIN.WARMUP_EPOCHS": 1,
    "TRAIN.BASE_LR": 0.05,
    "TRAIN.WARMUP_LR": 5e-5,
    "TRAIN.MIN_LR": 5e-4,
    "TRAIN.MODEL_EMA_DECAY": 0.9,
    "AUG.MESA": 1.0,
    "AUG.MESA_START": 0.5,
    "AMP_ENABLE": False,
}


class Batches:
    """A loader of five batches per epoch, numbered through all epochs."""

    def __init__(self) -> None:
        self.sampler = SimpleNamespace(epoch=0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for update in range(UPDATES * self.sampler.epoch, UPDATES * (self.sampler.epoch + 1)):
            image = golden_fill.image(f"traj{update}", (BATCH, 3, 64, 64)).double()
            yield image, (torch.arange(BATCH) * 37 + update) % CLASSES, torch.zeros(BATCH)


class Recorder(RunLog):
    """Records the figures of every update."""

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.figures: list[Mapping[str, float]] = []

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self.figures.append(values)


def smoothed(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    return images, 0.1 / CLASSES + 0.9 * torch.nn.functional.one_hot(classes, CLASSES).double()


@pytest.fixture(scope="module")
def run() -> TrainingRun:
    config, _ = load_config("spatialmamba_tiny", list(SETTINGS.items()))
    process = Process(0, 1, torch.device("cpu"))
    model = golden_fill.fill_(build_model(config, CLASSES)).double()
    optimizer = build_optimizer(config, model, 1)
    scheduler = build_scheduler(config, optimizer, UPDATES, 1)
    ema = ModelEmaV3(model, decay=config.TRAIN.MODEL_EMA_DECAY)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(model, ema, optimizer, scheduler, scaler, [str(i) for i in range(CLASSES)])
    criterion = build_criterion(config)
    run = TrainingRun(
        config, process, Recorder(process), state, model, Batches(), criterion, smoothed, UPDATES, torch.float32,
        save=lambda: None,
    )  # fmt: skip
    for epoch in range(EPOCHS):
        state.totals = EpochTotals()
        train_one_epoch(run, epoch)
    return run


@pytest.mark.parametrize(
    ("figure", "golden"),
    [("loss", "losses"), ("gradient_norm", "grad_norms"), ("learning_rate", "learning_rates")],
)
def test_every_update_is_the_published_one(run: TrainingRun, figure: str, golden: str) -> None:
    with np.load(GOLDEN / "trajectory.npz") as expected:
        found = [figures[f"train/{figure}"] for figures in run.log.figures]
        np.testing.assert_allclose(found, expected[golden], rtol=1e-6)


@pytest.mark.parametrize("which", ["model", "EMA"])
def test_final_weights_and_logits_are_the_published_ones(run: TrainingRun, which: str) -> None:
    model = run.state.model if which == "model" else run.state.ema.module
    norms, logits = ("weight_norms", "eval_logits") if which == "model" else ("ema_norms", "ema_eval_logits")
    with np.load(GOLDEN / "trajectory.npz") as expected:
        state = model.state_dict()
        assert set(expected["names"]) == {name for name in state if not name.endswith("num_batches_tracked")}
        found = [state[name].double().norm().item() for name in expected["names"]]
        np.testing.assert_allclose(found, expected[norms], rtol=1e-6)
        with torch.no_grad():
            predicted = model.eval()(golden_fill.image("trajeval", (2, 3, 64, 64)).double())
        np.testing.assert_allclose(predicted.numpy(), expected[logits], rtol=1e-6, atol=1e-6)
