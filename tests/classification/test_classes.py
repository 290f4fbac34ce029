"""The classes of a checkpoint and of the data are matched by name."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_mamba.classification.checkpoint import BEST, LATEST
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint
from spatial_mamba.classification.trainer import prepare
from spatial_mamba.kernels.errors import UserError

from .runs import accuracy_lines, options, pack, renamed


def test_finetuning_replaces_a_classifier_of_another_size(
    trained: Path, micro: Path, digits: Path, tmp_path: Path
) -> None:
    config, notes = load_config(
        micro,
        [("DATA.DATA_PATH", str(digits)), ("OUTPUT", str(tmp_path)), ("MODEL.PRETRAINED", str(trained / BEST)),
         ("MODEL.FINETUNE", True)],
    )  # fmt: skip
    job = prepare(config, notes)
    source = read_checkpoint(trained / BEST)["model"]
    for name, tensor in job.state.model.state_dict().items():
        if name.startswith("head."):
            assert tensor.shape[0] == 10
        else:
            assert torch.equal(tensor, source[name]), name


def right_answers(text: str) -> list[int]:
    """Numbers of correct predictions of the model and of its EMA."""
    return [int(count) for count in re.findall(r"acc@1 [\d.]+% \((\d+)/", text)]


def test_evaluation_finds_the_classes_by_name(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """For any order of the checkpoint's classes, and for a subset of them."""

    def evaluate(checkpoint: Path, data: Path) -> list[str]:
        assert main(options(micro, data, tmp_path, "--eval", "--pretrained", str(checkpoint))) == 0
        return accuracy_lines(capfd.readouterr().out)

    expected = evaluate(trained / BEST, photos)
    content = torch.load(trained / BEST, weights_only=True)
    content["classes"] = ["2", "0", "1"]
    for state in (content["model"], content["model_ema"]):
        state |= {name: state[name][[2, 0, 1]] for name in ("head.weight", "head.bias")}
    torch.save(content, tmp_path / "reordered.pth")
    assert evaluate(tmp_path / "reordered.pth", photos) == expected

    parts = [renamed(photos, tmp_path / name, dict(zip(name, name, strict=True))) for name in ("20", "1")]
    counts = [right_answers("\n".join(evaluate(tmp_path / "reordered.pth", part))) for part in parts]
    assert [sum(pair) for pair in zip(*counts, strict=True)] == right_answers("\n".join(expected))


def test_evaluation_refuses_other_classes(
    trained: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = renamed(photos, tmp_path / "data", {"0": "0", "1": "cat", "2": "dog"})
    few = renamed(photos, tmp_path / "few", {"0": "0", "1": "1"})
    torch.save({"model": read_checkpoint(trained / BEST)["model"]}, tmp_path / "nameless.pth")
    for checkpoint, folder, message in (
        (trained / BEST, data, f"{data}: the classes are not those of the checkpoint: only the data has cat, dog and"),
        (tmp_path / "nameless.pth", few, f"{few}: the data set has 2 classes, but the classifier of"),
    ):
        assert main(options(micro, folder, tmp_path, "--eval", "--pretrained", str(checkpoint))) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {message}") and "--finetune" not in error


def test_a_run_is_not_resumed_on_other_classes(
    continued: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Otherwise a run on a second data set with the default tag would end at once, as if it were finished."""
    data = renamed(photos, tmp_path / "data", {"0": "cat", "1": "dog", "2": "cow"})
    few = renamed(photos, tmp_path / "few", {"0": "0", "1": "1"})
    reordered = renamed(photos, tmp_path / "reordered", {"0": "0", "1": "1", "2": "2"})
    for folder, message in (
        (data, "only the data has cat, cow, dog and only the checkpoint has 0, 1, 2; start a new run under another"),
        (few, "only the checkpoint has 2;"),
    ):
        assert main(options(micro, folder, tmp_path)) == 2
        assert f"cannot resume with other classes: {message}" in capfd.readouterr().err
    nameless = read_checkpoint(continued / LATEST)
    del nameless["classes"]
    torch.save(nameless, tmp_path / "nameless.pth")
    assert main(options(micro, few, tmp_path / "new", "--resume", str(tmp_path / "nameless.pth"))) == 2
    assert "cannot resume with other classes: it has 3, but the data has 2;" in capfd.readouterr().err
    nameless["classes"] = ["1", "0", "2"]
    torch.save(nameless, tmp_path / "order.pth")
    assert main(options(micro, reordered, tmp_path / "new", "--resume", str(tmp_path / "order.pth"))) == 2
    assert "cannot resume with other classes: they are in a different order;" in capfd.readouterr().err


def test_a_pretrained_classifier_is_matched_by_class_name(
    trained: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    source = read_checkpoint(trained / BEST)

    def head(data: Path, classes: list[str] | None, *settings: tuple[str, Any]) -> Tensor:
        torch.save({**source, "classes": classes}, tmp_path / "start.pth")
        config, notes = load_config(
            micro,
            [("DATA.DATA_PATH", str(data)), ("OUTPUT", tempfile.mkdtemp(dir=tmp_path)),  # each run locks its folder
             ("MODEL.PRETRAINED", str(tmp_path / "start.pth")), *settings],
        )  # fmt: skip
        return prepare(config, notes).state.model.head.weight

    expected = source["model"]["head.weight"]
    other = renamed(photos, tmp_path / "other", {"0": "cat", "1": "dog", "2": "cow"})
    assert torch.equal(head(photos, ["0", "1", "2"]), expected)
    assert torch.equal(head(photos, ["2", "0", "1"]), expected[[1, 2, 0]])
    assert torch.equal(head(other, None), expected), "a checkpoint without names is taken as it is"
    with pytest.raises(UserError, match=r"is for other classes: only the data has cat, cow, dog .* add --finetune"):
        head(other, ["0", "1", "2"])
    assert not torch.equal(head(other, ["0", "1", "2"], ("MODEL.FINETUNE", True)), expected)


def test_numbers_in_a_class_list_are_not_names(trained: Path, micro: Path, photos: Path, tmp_path: Path) -> None:
    data = pack(renamed(photos, tmp_path / "data", {"0": "0", "1": "1", "2": "2"}), "zip with a map", tmp_path)
    named = read_checkpoint(trained / BEST)
    named["classes"] = ["cat", "cow", "dog"]
    torch.save(named, tmp_path / "named.pth")
    settings = [("DATA.DATA_PATH", str(data)), ("OUTPUT", str(tmp_path)), ("MODEL.PRETRAINED", tmp_path / "named.pth")]
    config, notes = load_config(micro, [(key, str(value)) for key, value in settings])
    job = prepare(config, notes)
    assert job.state.classes is None
    assert torch.equal(job.state.model.head.weight, named["model"]["head.weight"])
