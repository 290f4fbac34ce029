"""The reference implementation of scan, fusion and read-out compared with its parts."""

from typing import Any

import pytest
import torch

from spatial_mamba.kernels import structure_aware_scan

from .inputs import (
    BATCH,
    DIM,
    assert_near,
    assert_wrong_tensors_are_refused,
    core_inputs,
    fuse_by_gathering,
    scan_loop,
)

pytestmark = pytest.mark.usefixtures("reference_backend")


def test_core_matches_scan_fusion_and_read_out() -> None:
    inputs = core_inputs()
    r, B, C = inputs["projection"].split([3, 1, 1], dim=-1)
    h, _ = scan_loop(
        inputs["u"].flatten(1, 2).mT.double(),
        (r @ inputs["step_weight"].T).flatten(1, 2).mT.double(),
        -inputs["A_log"].double().exp()[:, None],
        B.flatten(1, 2).mT.double(),
        delta_bias=inputs["step_bias"].double(),
        delta_softplus=True,
    )
    fused = fuse_by_gathering(h[:, :, 0].unflatten(-1, (4, 5)), inputs["kernels"], inputs["alpha"], (1, 3, 5))
    expected = C * fused.permute(0, 2, 3, 1) + inputs["D"] * inputs["u"]
    assert_near(structure_aware_scan(**inputs), expected, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"projection": torch.ones(BATCH, 4, 5, 4)},
            r"^projection must have shape \(.*, R \+ 2\) with .* R = 3, got \(2, 4, 5, 4\)",
        ),
        ({"step_weight": torch.ones(DIM, 0)}, "^step_weight must have shape .* R >= 1"),
        ({"alpha": torch.ones(2)}, r"alpha of shape \(2,\)"),
        ({"dilations": (0, 1, 2)}, "^dilations must be"),
    ],
)
def test_core_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure_aware_scan(**core_inputs() | change)


def test_core_refuses_an_output_dtype_without_fractions() -> None:
    with pytest.raises(TypeError, match=r"^out_dtype must be a floating-point type, got torch.int32"):
        structure_aware_scan(**core_inputs(), out_dtype=torch.int32)


def test_core_refuses_wrong_tensors() -> None:
    assert_wrong_tensors_are_refused(
        structure_aware_scan,
        core_inputs(),
        u=[(DIM, 4, 5), (BATCH, 4, 0, DIM)],
        step_weight=[(DIM + 1, 3)],
        step_bias=[(DIM, 1)],
        A_log=[(DIM, 1)],
        D=[(1,)],
    )
