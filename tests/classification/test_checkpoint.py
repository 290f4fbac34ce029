"""Checkpoints: written atomically, read from the published trainer and frameworks, refused if they do not fit."""

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from spatial_mamba.classification import engine
from spatial_mamba.classification.checkpoint import (
    BEST,
    BEST_EMA,
    LATEST,
    _load_optimizer,
    find_resumable,
    save_checkpoint,
)
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint
from spatial_mamba.classification.optim import build_optimizer, build_scheduler
from spatial_mamba.classification.trainer import prepare
from spatial_mamba.kernels.errors import UserError

from .micro_models import LeavesATrace
from .published import published_checkpoint
from .runs import accuracy_lines, after_calls, assert_same, full_disk, options, records


def test_an_interrupted_save_leaves_the_old_checkpoint(continued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (continued / LATEST).read_bytes()
    config, _ = load_config("spatialmamba_digits")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = engine.TrainingState(
        model, None, optimizer, build_scheduler(config, optimizer, 1, 1), torch.amp.GradScaler(enabled=False), ["a"]
    )

    def torn(content: Any, file: IO[bytes]) -> None:
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(UserError, match=r"cannot be written \(disk full\); the previous checkpoint is kept"):
            save_checkpoint(state, config, continued / LATEST)
    assert not [path for path in continued.iterdir() if "unfinished" in path.name]
    assert (continued / LATEST).read_bytes() == before
    save_checkpoint(state, config, continued / LATEST)
    assert set(read_checkpoint(continued / LATEST)["model"]) == {"weight", "bias"}


@pytest.mark.parametrize("name", ["adamw", "lamb", "lookahead_adamw"])
def test_an_optimiser_continues_exactly(name: str) -> None:
    config, _ = load_config("spatialmamba_digits", [("TRAIN.OPTIMIZER.NAME", name)])
    models = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    optimizers = [build_optimizer(config, model, 1) for model in models]

    def update(which: int) -> None:
        optimizers[which].zero_grad()
        models[which](torch.linspace(-1, 1, 4)).square().sum().backward()
        optimizers[which].step()

    for _ in range(8):
        update(0)
    models[1].load_state_dict(models[0].state_dict())
    _load_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()), Path("latest.pth"))
    for _ in range(8):  # Lookahead changes the weights in update 12
        update(0)
        update(1)
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_a_failure_of_the_first_save_does_not_block_the_run(
    micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(micro, photos, tmp_path, "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "No space left on device" in error and "kept" not in error
    assert main(arguments) == 0
    assert len(records(tmp_path / "micro/default")) == 1


def damage_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change what the optimiser keeps for its last parameter, a matrix."""

    def damage(content: dict[str, Any]) -> None:
        state = content["optimizer"]["state"]
        number = max(number for number, values in state.items() if values["exp_avg"].ndim == 2)
        state[number] |= change(state[number])

    return damage


DAMAGES = {
    "small": (damage_state(lambda state: {"exp_avg": torch.ones(1)}), "exp_avg is (1,)"),
    "scalar": (damage_state(lambda state: {"exp_avg_sq": torch.ones(())}), "exp_avg_sq is ()"),
    "integers": (damage_state(lambda state: {"exp_avg": state["exp_avg"].long()}), "torch.int64"),
    "number": (damage_state(lambda state: {"exp_avg": 0.5}), "exp_avg is not a tensor"),
    "steps": (damage_state(lambda state: {"step": torch.ones(3)}), "step is (3,)"),
    "missing": (lambda content: content["optimizer"]["state"].pop(3), "its optimiser does not fit this run (3)"),
    "no value": (lambda content: content["optimizer"]["state"][3].pop("exp_avg"), "parameter 3 has no exp_avg"),
    "no values": (
        lambda content: [values.pop("exp_avg") for values in content["optimizer"]["state"].values()],
        "it keeps exp_avg_sq, step, but adamw keeps exp_avg, exp_avg_sq, step",
    ),
    "foreign": (lambda content: content["optimizer"]["state"].update({999: {}}), "its state is for other parameters"),
    "decay": (
        lambda content: content["optimizer"]["param_groups"][0].update(weight_decay=torch.ones(2)),
        "its optimiser does not fit this run",
    ),
    "average": (lambda content: content.update(model_ema=torch.ones(2)), "found no model weights; expected"),
    "text": (lambda content: content["optimizer"].update(state="none"), "its optimiser does not fit this run"),
    "epoch": (lambda content: content.update(epoch=torch.tensor(1)), "its epoch is tensor(1)"),
    "late epoch": (lambda content: content.update(epoch=2**60), "its epoch is 1152921504606846976"),
    "record": (lambda content: content.update(max_accuracy=float("nan")), "its max_accuracy is nan"),
    "counter": (lambda content: content.update(steps="many"), "its steps is 'many'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_not_resumed(
    name: str, trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    damage, words = DAMAGES[name]
    content = read_checkpoint(trained / LATEST)
    damage(content)
    torch.save(content, tmp_path / "damaged.pth")
    assert main(options(micro, photos, tmp_path, "--epochs", "3", "--resume", str(tmp_path / "damaged.pth"))) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("config", [{"LOCAL_RANK": 0, "TRAIN": 3}, {"DATA": {"BATCH_SIZE": torch.ones(2)}}], ids=str)
def test_a_run_with_a_damaged_config_is_resumed(
    config: dict[str, Any], trained: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    content = read_checkpoint(trained / LATEST)
    content["environment"]["total batch"] = 8  # another one, which is then compared with the config
    torch.save(content | {"config": config}, tmp_path / "damaged.pth")
    assert main(options(micro, photos, tmp_path, "--resume", str(tmp_path / "damaged.pth"))) == 0


def test_the_state_of_an_optimiser_takes_the_layout_of_its_parameters(
    trained: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    content = read_checkpoint(trained / LATEST)
    arguments = ["--epochs", "3", "--resume", str(tmp_path / "latest.pth")]
    results = []
    for name, layout in (("plain", lambda t: t), ("transposed", lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)):
        state = {n: {k: layout(t) for k, t in v.items()} for n, v in content["optimizer"]["state"].items()}
        torch.save({**content, "optimizer": {**content["optimizer"], "state": state}}, tmp_path / "latest.pth")
        assert main(options(micro, photos, tmp_path / name, *arguments)) == 0
        results.append(read_checkpoint(tmp_path / name / "micro/default" / LATEST)["model"])
    assert_same(*results)


def test_auto_resume_takes_the_newest_intact_checkpoint(
    continued: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    torn = (continued / LATEST).read_bytes()[:5000]
    (continued / LATEST).write_bytes(torn)
    assert main(options(micro, photos, tmp_path)) == 0
    output = capfd.readouterr().out
    assert "skipping" in output and f"{LATEST}: " in output
    assert f"resumed from {continued / BEST}" in output or f"resumed from {continued / BEST_EMA}" in output


def test_the_newest_checkpoint_is_found_by_whole_numbers(trained: Path, tmp_path: Path) -> None:
    content = read_checkpoint(trained / BEST)
    torch.save({**content, "steps": "many"}, tmp_path / BEST)
    torch.save(content, tmp_path / BEST_EMA)
    path, _ = find_resumable(tmp_path) or (None, None)
    assert path == tmp_path / BEST_EMA


def test_published_checkpoints_load_and_resume(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = published_checkpoint(trained, tmp_path / "published.pth")
    assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(path))) == 0
    last = records(trained)[-1]
    lines = accuracy_lines(capfd.readouterr().out)
    assert f"{last['val_acc1']:.3f}%" in lines[0] and f"{last['ema_acc1']:.3f}%" in lines[1]

    config, notes = load_config(
        micro, [("DATA.DATA_PATH", str(photos)), ("OUTPUT", str(tmp_path)), ("MODEL.RESUME", str(path))]
    )
    job = prepare(config, notes)
    assert capfd.readouterr().out == ""  # no setting has another meaning
    assert (job.state.epoch, job.state.updates) == (1, 12)
    assert job.state.max_accuracy_ema == last["max_accuracy_ema"]
    assert_same(job.state.optimizer.state_dict(), read_checkpoint(trained / LATEST)["optimizer"])


def test_checkpoints_of_numpy_1_load(tmp_path: Path) -> None:
    torch.save({"best": np.float64(83.5)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core", b"numpy.core"))
    assert read_checkpoint(tmp_path / "new.pth") == read_checkpoint(tmp_path / "old.pth") == {"best": 83.5}


def test_a_foreign_type_in_a_checkpoint_is_refused_and_not_executed(
    micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    torch.save({"model": {}, "extra": LeavesATrace(tmp_path / "executed")}, tmp_path / "evil.pth")
    assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(tmp_path / "evil.pth"))) == 2
    error = capfd.readouterr().err
    assert "evil.pth: refused, because it asks to load posix.mkdir" in error
    assert not (tmp_path / "executed").exists()


def test_weights_with_prefixes_of_frameworks_are_evaluated(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    content = torch.load(trained / BEST, weights_only=True)
    model = {f"net.{name}": tensor for name, tensor in content["model"].items()}
    ema = {f"module.{name}": tensor for name, tensor in content["model_ema"].items()}
    for name, key in (("timm.pth", "state_dict_ema"), ("framework.pth", "model_ema")):
        torch.save({"state_dict": model, key: ema, "config": content["config"]}, tmp_path / name)
    results = []
    for path in (trained / BEST, tmp_path / "timm.pth", tmp_path / "framework.pth"):
        assert main(options(micro, photos, tmp_path, "--eval", "--pretrained", str(path))) == 0
        output = capfd.readouterr().out
        results.append(accuracy_lines(output))
    assert results[0] == results[1] == results[2] and len(results[0]) == 2
    assert output.count("framework.pth: loading the weights named net.* without this prefix") == 1


@pytest.mark.parametrize("name", ["sgd", "lamb", "adam", "nadamw"])
def test_the_state_of_another_optimiser_is_refused(
    name: str, trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = options(micro, photos, tmp_path, "--optim", name, "--resume", str(trained / LATEST))
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert f"was trained with adamw, not {name}; add --optim adamw, or start a new run" in error
    if name == "sgd":
        content = read_checkpoint(trained / LATEST)
        del content["config"]
        torch.save(content, tmp_path / "bare.pth")
        assert main([*arguments[:-1], str(tmp_path / "bare.pth")]) == 2
        assert "a different optimiser from sgd: it keeps exp_avg, exp_avg_sq, step, but sgd" in capfd.readouterr().err
        assert main([*options(micro, photos, tmp_path), "--resume", str(tmp_path / "bare.pth")]) == 0


@pytest.mark.parametrize("has_links", [True, False])
def test_the_last_checkpoints_are_kept_on_request(
    has_links: bool, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Old ones are deleted when the new one is complete; a damaged one is skipped for the one before it."""
    folder = tmp_path / "micro" / "default"
    arguments = options(micro, photos, tmp_path, "--save-minutes", "1e-9", "--keep-checkpoints", "3", "--epochs", "1")
    arguments += ["--opts", "TRAIN.WARMUP_EPOCHS", "0"]

    if not has_links:
        monkeypatch.setattr("os.link", full_disk)
    with monkeypatch.context() as patch:
        after_calls(patch, engine, "_update", 5, lambda: patch.setattr(torch, "save", full_disk))
        assert main(arguments) == 2
    kept = [folder / f"update_0000000{number}.pth" for number in (2, 3, 4)]
    assert sorted(folder.glob("update_*")) == kept and not list(folder.glob(".*.unfinished*"))
    assert [read_checkpoint(path)["steps"] for path in (*kept, folder / LATEST)] == [2, 3, 4, 4]
    assert (kept[-1].stat().st_nlink == 2) is has_links
    for path in (folder / LATEST, kept[-1]):
        path.write_bytes(path.read_bytes()[:5000])
    capfd.readouterr()
    assert main(arguments) == 0
    output = capfd.readouterr().out
    assert output.count("skipping a checkpoint that cannot be read") == 2 and f"resumed from {kept[1]}" in output
    assert [read_checkpoint(path)["steps"] for path in sorted(folder.glob("update_*"))] == [4, 5, 6]
