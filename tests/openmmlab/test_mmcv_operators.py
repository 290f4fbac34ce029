"""mmcv's operators on torchvision, compared with outputs of compiled ones in ``data/mmcv_operators.npz``.

Run as a script, it writes that file, in an environment whose mmcv is compiled (it was mmcv 2.1.0).
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)

import mmcv
from mmcv import ops
from mmcv.ops.focal_loss import sigmoid_focal_loss
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

from spatial_mamba_mmcv import MissingOperatorError

REFERENCE = Path(__file__).parents[1] / "data" / "mmcv_operators.npz"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
NMS = {
    "nms": lambda boxes, scores: ops.nms(boxes, scores, 0.5),
    "nms with offset": lambda boxes, scores: ops.nms(boxes, scores, 0.4, offset=1),
    "nms, best 5 above 0.3": lambda boxes, scores: ops.nms(boxes, scores, 0.5, score_threshold=0.3, max_num=5),
    "nms by class": lambda boxes, scores: ops.batched_nms(
        boxes, scores, torch.arange(len(scores)) % 3, dict(type="nms", iou_threshold=0.5)
    ),
    "soft, naive": lambda boxes, scores: ops.soft_nms(boxes, scores, 0.3, method="naive", min_score=0.1),
    "soft, linear": lambda boxes, scores: ops.soft_nms(boxes, scores, 0.3, method="linear", offset=1),
    "soft, gaussian": lambda boxes, scores: ops.soft_nms(boxes, scores, sigma=0.5, method="gaussian", min_score=0.05),
}
TIED = [
    9,
    10,
    15,
    57,
    20,
    52,
    48,
    21,
    25,
    26,
    36,
    55,
    51,
    43,
    24,
    8,
    0,
    46,
    32,
    34,
    1,
    54,
    2,
    53,
    28,
    29,
    18,
    6,
    38,
    22,
]
TIED += [41, 44, 56, 33, 19, 35, 59, 47]
ALIGN = [(aligned, ratio, dtype) for aligned in (True, False) for ratio in (0, 2) for dtype in DTYPES]


def boxes_and_scores(shortest: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes with integer corners, with IoUs of 0, of 1, of exactly a threshold, and in between."""
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, 30, (60, 2)), rng.integers(shortest, 25, (60, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return torch.from_numpy(boxes).float(), torch.from_numpy(rng.permutation(60) / 60 + 0.001).float()


def pooled(aligned: bool, ratio: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RoIAlign's output and the gradient of its input, for regions that reach beyond the map."""
    rng = np.random.default_rng(1)
    maps = torch.from_numpy(rng.standard_normal((2, 3, 13, 17))).to(dtype).requires_grad_()
    corners, sides = rng.uniform(-4, 40, (9, 2)), rng.uniform(0, 30, (9, 2))
    rois = np.concatenate([rng.integers(0, 2, (9, 1)), corners, corners + sides], axis=1)
    output = ops.RoIAlign((3, 2), 0.37, ratio, aligned=aligned)(maps, torch.from_numpy(rois).to(dtype))
    weights = torch.from_numpy(rng.standard_normal(output.shape)).to(dtype)
    return output, torch.autograd.grad(output, maps, weights)[0]


def compute() -> dict[str, Tensor]:
    results = {}
    for name, operator in NMS.items():
        results[f"{name}/dets"], results[f"{name}/indices"] = operator(
            *boxes_and_scores(shortest="soft" in name)  # between empty boxes the compiled one makes NaN
        )
    for aligned, ratio, dtype in ALIGN:
        output, gradient = pooled(aligned, ratio, DTYPES[dtype])
        results[f"{aligned} {ratio} {dtype}/output"] = output.detach()
        results[f"{aligned} {ratio} {dtype}/gradient"] = gradient
    return results


def test_results_are_those_of_the_compiled_operators() -> None:
    results = compute()
    with np.load(REFERENCE) as reference:
        assert set(reference) == set(results)
        for name, result in results.items():
            expected = torch.from_numpy(reference[name])
            tolerance = 2e-3 if result.dtype == torch.float16 else 1e-6
            torch.testing.assert_close(
                result, expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_empty_boxes_leave_soft_nms_finite() -> None:
    boxes, scores = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 2, 2]]), torch.tensor([0.9, 0.8, 0.7])
    dets, indices = ops.soft_nms(boxes, scores, method="gaussian")
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)) and indices.tolist() == [0, 1, 2]


def test_equal_scores_in_soft_nms() -> None:
    """The compiled operator keeps the first of equal scores, after boxes have replaced dropped ones."""
    boxes, scores = boxes_and_scores(shortest=1)
    assert ops.soft_nms(boxes, (scores * 4).ceil() / 4, 0.3, method="naive")[1].tolist() == TIED


def test_saturated_focal_loss_has_finite_gradients() -> None:
    logits = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([0]), 0.5, 0.25, None, "none").sum().backward()
    assert logits.grad.isfinite().all()


def test_no_boxes() -> None:
    dets, indices = ops.nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert dets.shape == (0, 5) and indices.shape == (0,)
    dets, indices = ops.soft_nms(torch.empty(0, 4), torch.empty(0))
    assert dets.shape == (0, 5) and indices.shape == (0,)
    output = ops.RoIAlign(2)(torch.ones(1, 3, 4, 4, requires_grad=True), torch.empty(0, 5))
    assert output.shape == (0, 3, 2, 2)
    output.sum().backward()


def test_dtypes_that_the_compiled_operators_refuse_are_computed_in_float32() -> None:
    boxes, scores = boxes_and_scores()
    for dtype in (torch.float16, torch.bfloat16):
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        assert torch.equal(ops.nms(boxes, scores, 0.5)[1], ops.nms(boxes.float(), scores.float(), 0.5)[1])
    for half, single in zip(pooled(True, 2, torch.bfloat16), pooled(True, 2, torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), single, rtol=0.1, atol=0.1)


def test_focal_loss_is_that_of_mmdet() -> None:
    """On CPUs, mmdet computes the loss in PyTorch; it calls mmcv's operator only on GPUs."""
    from mmdet.models.losses.focal_loss import FocalLoss

    torch.manual_seed(0)
    target = torch.tensor([0, 3, 1, 4, 2, 4])  # 4 is the background
    results = []
    for loss in (lambda x: sigmoid_focal_loss(x, target, 1.5, 0.3, None, "none"), FocalLoss(True, 1.5, 0.3, "none")):
        logits = (torch.arange(24.0).reshape(6, 4) / 3 - 4).requires_grad_()
        values = loss(logits) if not isinstance(loss, FocalLoss) else loss(logits, target)
        results.append((values, torch.autograd.grad(values.sum(), logits)[0]))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_deformable_attention_has_the_gradients_of_its_reference() -> None:
    shapes, starts = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
    results = []
    for native in (True, False):
        torch.manual_seed(0)
        value, locations, weights = torch.randn(2, 26, 2, 3), torch.rand(2, 7, 2, 2, 4, 2), torch.rand(2, 7, 2, 2, 4)
        inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        if native:
            output = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        else:
            output = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_operators_that_exist_only_compiled_name_the_command() -> None:
    maps = torch.ones(1, 2, 5, 5)
    command = r"pip uninstall -y mmcv-lite && .*--no-build-isolation .*mmcv==2\.1\.0"
    for operator, what in (
        (lambda: ops.DeformConv2d(2, 2, 3)(maps, torch.zeros(1, 18, 3, 3)), "the operator deform_conv_forward"),
        (lambda: ops.RoIAlign(2, pool_mode="max")(maps, torch.zeros(1, 5)), "RoIAlign with pool_mode='max'"),
        (lambda: sigmoid_focal_loss(torch.ones(1, 2), torch.ones(1).long(), 2.0, 0.25, torch.ones(2)), "class weights"),
    ):
        with pytest.raises(MissingOperatorError, match=rf"{what} needs mmcv's compiled operators: {command}"):
            operator()


def test_a_compiled_module_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert Path(importlib.util.find_spec("mmcv._ext").origin).name == "operators.py"
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    compiled = tmp_path / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    compiled.touch()
    assert importlib.util.find_spec("mmcv._ext").origin == str(compiled)


def test_mmengine_finds_the_operators_without_pkgutils_find_loader() -> None:
    """Python 3.14 has removed the function; the test removes it temporarily."""
    code = "import pkgutil; vars(pkgutil).pop('find_loader', None); import spatial_mamba.detection\n"
    code += "from mmengine.utils.dl_utils import mmcv_full_available; assert mmcv_full_available()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


if __name__ == "__main__":
    np.savez_compressed(REFERENCE, **{name: result.numpy() for name, result in compute().items()})
