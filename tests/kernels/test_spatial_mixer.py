"""The reference implementation of the mixer compared with its parts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spatial_mamba.kernels import spatial_mixer, structure_aware_scan, use_backend
from spatial_mamba.kernels.backends import why_not
from spatial_mamba.kernels.state_fusion import merge_taps

from .inputs import BATCH, DIM, assert_near, assert_wrong_tensors_are_refused, core_inputs, generator

pytestmark = pytest.mark.usefixtures("reference_backend")


def mixer_inputs(merged: bool = False) -> dict[str, Any]:
    core = core_inputs()
    del core["u"], core["projection"]
    g = generator(1)
    if merged:
        taps = merge_taps(core["kernels"], core["alpha"], (1, 3, 5))
        core |= dict(kernels=None, alpha=None, taps=taps)
    return (
        dict(
            xz=torch.randn(BATCH, 4, 5, 2 * DIM, generator=g),
            conv_weight=torch.randn(DIM, 1, 3, 3, generator=g),
            conv_bias=torch.randn(DIM, generator=g),
            projection_weight=torch.randn(5, DIM, generator=g),
            norm_weight=torch.randn(DIM, generator=g),
            norm_bias=torch.randn(DIM, generator=g),
        )
        | core
    )


@pytest.mark.parametrize("merged", [False, True])
def test_mixer_matches_the_sequence_of_its_parts(merged: bool) -> None:
    core = mixer_inputs()
    x, gate = core.pop("xz").split(DIM, dim=-1)
    conv_weight, conv_bias, projection_weight, norm_weight, norm_bias = (
        core.pop(name) for name in ("conv_weight", "conv_bias", "projection_weight", "norm_weight", "norm_bias")
    )
    u = F.silu(F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1, groups=DIM)).permute(0, 2, 3, 1)
    y = structure_aware_scan(u, u @ projection_weight.T, **core)
    expected = F.layer_norm(y, (DIM,), norm_weight, norm_bias) * F.silu(gate)
    assert_near(spatial_mixer(**mixer_inputs(merged)), expected, 1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# A band holds a quarter of these maps, and fewer rows than fusion reads with dilation 20.
@pytest.mark.skipif(why_not("cpu", "cpu", torch.float32) is not None, reason="needs the cpu backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dilations", [(1, 3, 5), (1, 3, 20)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_bands_of_rows_give_what_whole_maps_give(
    dtype: torch.dtype, dilations: tuple[int, ...], keep: bool, threads: Callable[[int], None]
) -> None:
    g, dim = generator(2), 70  # not a multiple of the lanes of a vector
    shapes = [(3, 60, 40, 2 * dim), (dim, 1, 3, 3), (dim,), (5, dim), (dim, 3), (dim,), (dim,), (dim,), (25, dim)]
    xz, conv, conv_bias, projection, step, step_bias, A_log, D, taps = (
        (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype) for shape in shapes
    )
    xz.requires_grad_(keep)
    inputs = (xz, conv, conv_bias, projection, step, step_bias, A_log, D, None, None, D, step_bias)

    def run() -> list[torch.Tensor]:
        out = spatial_mixer(*inputs, dilations=dilations, taps=taps)
        return [out, *(torch.autograd.grad(out.square().sum(), xz) if keep else ())]

    expected = run()
    for count in (1, 4):  # three images on one thread, and each image on four
        threads(count)
        with use_backend("cpu"):
            actual = run()
        for x, y in zip(actual, expected, strict=True):
            assert_near(x.float(), y.float(), 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"projection_weight": torch.ones(4, DIM)},
            r"^projection_weight must have shape \(R \+ 2, dim\) with R = 3, dim = 4, got",
        ),
        ({"step_weight": torch.ones(DIM, 0)}, "^step_weight must have shape .* R >= 1"),
        ({"alpha": torch.ones(2)}, r"alpha of shape \(2,\)"),
        ({"dilations": (0, 1, 2)}, "^dilations must be"),
        ({"alpha": None}, "^give either kernels and alpha, or taps, which can have kernel_sizes; got kernels$"),
        ({"kernels": None, "alpha": None}, "; got none of them$"),
        ({"taps": torch.ones(25, DIM)}, "; got kernels, alpha, taps$"),
        ({"kernel_sizes": [3, 3, 3]}, "; got kernels, alpha, kernel_sizes$"),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(27, DIM)},
            r"^taps must have shape \(T, dim\) with T = 25, dim = 4, got \(27, 4\)",
        ),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(25, DIM), "kernel_sizes": (3, 4, 3)},
            r"^kernel_sizes must be odd, one per dilation of \(1, 3, 5\), got \(3, 4, 3\)",
        ),
        (
            {"kernels": None, "alpha": None, "taps": torch.ones(25, DIM), "dilations": (1, 0, 5)},
            "^dilations must be",
        ),
    ],
)
def test_mixer_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_mixer(**mixer_inputs() | change)


def test_mixer_refuses_wrong_tensors() -> None:
    assert_wrong_tensors_are_refused(
        spatial_mixer,
        mixer_inputs(),
        xz=[(BATCH, 4, 5, 2 * DIM + 1), (BATCH, 4, 0, 2 * DIM), (4, 5, 2 * DIM)],
        conv_weight=[(DIM, 9)],
        conv_bias=[(1,)],
        step_weight=[(DIM + 1, 3)],
        step_bias=[(DIM, 1)],
        A_log=[(DIM, 1)],
        D=[(1,)],
        norm_weight=[(1,)],
        norm_bias=[(1,)],
    )
