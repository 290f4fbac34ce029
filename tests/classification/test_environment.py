"""What a run depends on besides its config: the total batch is kept, changes are reported."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spatial_mamba.classification.checkpoint import LATEST
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .runs import assert_same, options


@pytest.fixture
def resumed(trained: Path, micro: Path, photos: Path, tmp_path: Path) -> Callable[..., str]:
    """Resume the finished run, for another epoch, as if its checkpoint came from another environment."""

    def resume(*more: str, **changes: str | int) -> str:
        folder = tmp_path / "micro" / "default"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder)
        content = read_checkpoint(folder / LATEST)
        content["environment"] |= {name.replace("_", " "): value for name, value in changes.items()}
        torch.save(content, folder / LATEST)
        assert main(options(micro, photos, tmp_path, "--epochs", "3", *more)) == 0
        return (folder / "log.txt").read_text()

    return resume


def test_another_number_of_processes_keeps_the_total_batch(resumed: Callable[..., str], tmp_path: Path) -> None:
    log = resumed(processes=2, total_batch=8)
    assert "the total batch of 8 is kept: 2 accumulation steps" in log
    content = read_checkpoint(tmp_path / "micro/default" / LATEST)
    assert content["environment"]["total batch"] == 8 and content["steps"] == 3 * 3
    assert content["lr_scheduler"]["base_values"] == [0.05 * 8 / 512] * 2
    # The config is the given one, so the same command decides again in the same way.
    assert content["config"]["TRAIN"]["ACCUMULATION_STEPS"] == 1


@pytest.mark.parametrize(
    ("more", "total", "line"),
    [
        ((), 6, "changes from 6 to 4, because the 1 x 4 images of a step do not divide it; learning rates are scaled"),
        (("--batch-size", "6"), 4, "changes from 4 to 6, because DATA.BATCH_SIZE has changed"),
        (("--accumulation-steps", "2"), 4, "from 4 to 8, because TRAIN.ACCUMULATION_STEPS has changed"),
        (("--opts", "TRAIN.SCALE_LR", "False"), 6, "learning rates stay, as TRAIN.SCALE_LR is False"),
    ],
)
def test_another_total_batch_is_explained(
    more: tuple[str, ...], total: int, line: str, resumed: Callable[..., str]
) -> None:
    assert line in resumed(*more, total_batch=total)


def test_a_changed_environment_is_reported_in_one_line(resumed: Callable[..., str]) -> None:
    changes = {"threads": 99, "kernels": "triton", "device": "abacus", "PyTorch": "0.4"}
    (line,) = [line for line in resumed(**changes).splitlines() if "not bit for bit" in line]
    assert all(f"{name} {value}, now" in line for name, value in changes.items())
    assert "not bit for bit" not in resumed()


def test_checkpoints_without_an_environment_resume_silently(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    content = read_checkpoint(trained / LATEST)
    for environment in ({}, {"environment": None}, {"environment": {"total batch": -4, "threads": torch.ones(2)}}):
        content.pop("environment", None)
        torch.save(content | environment, tmp_path / "old.pth")
        assert main(options(micro, photos, tmp_path, "--resume", str(tmp_path / "old.pth"))) == 0
        log = (tmp_path / "micro/default/log.txt").read_text()
        assert log.count("WARNING") == log.count("this run is finished") == 1, log
        shutil.rmtree(tmp_path / "micro")


@pytest.fixture
def settings_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("settings_restored")
def test_deterministic_runs_have_the_same_bits_with_any_number_of_threads(
    micro: Path, photos: Path, tmp_path: Path
) -> None:
    contents = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arguments = options(micro, photos, tmp_path / str(threads), "--deterministic", "--epochs", "1")
        assert main([*arguments, "--opts", "TRAIN.WARMUP_EPOCHS", "0"]) == 0
        contents.append(read_checkpoint(tmp_path / str(threads) / "micro/default" / LATEST))
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert contents[0]["environment"]["threads"] == 1
    assert_same(*(content["model"] for content in contents))
