"""Starting a backbone from a classification checkpoint, and checkpoints that must be refused."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spatial_mamba.classification.models import WeightsError

from .micro_models import LeavesATrace, filled_classifier, golden_fill, micro_backbone, micro_classifier


def test_pretrained_backbone_that_ends_early(tmp_path: Path) -> None:
    state = filled_classifier().state_dict()
    torch.save({"model": state}, tmp_path / "classifier.pth")
    loaded = micro_backbone(out_indices=(0, 1), pretrained=tmp_path / "classifier.pth").state_dict()
    assert len(loaded) > 50
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if not name.startswith("outnorm"))
    with pytest.raises(WeightsError, match=r"another model.*depths=\(1, 1, 1, 1\)"):
        micro_backbone(depths=(1, 1), out_indices=(0, 1), pretrained=tmp_path / "classifier.pth")


def test_pretrained_backbone_leaves_out_unused_outnorms(tmp_path: Path) -> None:
    state = golden_fill.fill_(micro_backbone()).state_dict()
    torch.save({"model": state}, tmp_path / "backbone.pth")
    loaded = micro_backbone(out_indices=(1, 3), pretrained=str(tmp_path / "backbone.pth")).state_dict()
    assert state.keys() - loaded.keys() == {f"outnorm{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_missing_outnorms_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": golden_fill.fill_(micro_backbone(out_indices=(1, 2, 3))).state_dict()}, tmp_path / "three.pth")
    loaded = micro_backbone(pretrained=str(tmp_path / "three.pth"))
    assert "three.pth: has no outnorm0.bias, outnorm0.weight, which start from their initial values" in caplog.text
    assert (loaded.outnorm0.weight == 1).all() and not (loaded.outnorm1.weight == 1).any()


def save_truncated(path: Path, kept: float) -> None:
    torch.save({"model": filled_classifier().state_dict()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])


def save_one_missing(path: Path) -> None:
    state = filled_classifier().state_dict()
    del state["layers.2.blocks.0.self_attention.A_logs"]
    torch.save({"model": state}, path)


def save_one_too_many(path: Path) -> None:
    torch.save({"model": filled_classifier().state_dict() | {"layers.9.extra": torch.ones(1)}}, path)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        pytest.param(lambda path: None, "no such checkpoint file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "is a folder", id="folder"),
        pytest.param(lambda path: path.touch(), "empty", id="empty"),
        pytest.param(lambda path: save_truncated(path, 0.5), "truncated", id="half"),
        pytest.param(lambda path: save_truncated(path, 0.01), "truncated", id="a_hundredth"),
        pytest.param(lambda path: path.write_text("<html>Not found</html>"), "not a PyTorch checkpoint", id="text"),
        pytest.param(lambda path: path.write_text("Not found"), "not a PyTorch checkpoint", id="other_text"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps(3)), "not written by torch.save", id="pickle"),
        pytest.param(
            lambda path: torch.save({"model": micro_classifier(dims=16).state_dict()}, path),
            r"holds another model, custom \(dims 16, .* instead of custom \(dims 8,",
            id="other_width",
        ),
        pytest.param(save_one_missing, "in 1 entries: .*blocks.0.self_attention.A_logs is missing", id="one_missing"),
        pytest.param(save_one_too_many, "in 1 entries: layers.9.extra is not part of the model", id="one_too_many"),
        pytest.param(lambda path: torch.save([torch.ones(2)], path), "holds a list", id="list"),
        pytest.param(lambda path: torch.save({"model": {}}, path), "found no model weights", id="no_weights"),
        pytest.param(lambda path: torch.save({"epoch": 3}, path), "found no model weights", id="no_model"),
    ],
)
def test_unusable_pretrained_weights_are_an_error(tmp_path: Path, save: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "weights.pth"
    save(path)
    with pytest.raises(WeightsError, match=f"(?s)weights.pth: .*({message})"):
        micro_backbone(pretrained=path)


@pytest.mark.parametrize("writer", ["torch.save", "pickle.dump"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {"model": filled_classifier().state_dict(), "config": LeavesATrace(trace)}
    if writer == "torch.save":
        torch.save(content, path)
    else:
        with path.open("wb") as file:
            pickle.dump({"config": content["config"]}, file, protocol=2)
    with pytest.raises(WeightsError, match=r"weights.pth: refused, .*mkdir"):
        micro_backbone(pretrained=path)
    assert not trace.exists()

    torch.load(path, weights_only=False) if writer == "torch.save" else pickle.loads(path.read_bytes())
    assert trace.exists()  # so the file was harmful
