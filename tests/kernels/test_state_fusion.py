"""The reference implementation of the fusion compared with a lookup of every neighbour."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba.kernels import state_fusion
from spatial_mamba.kernels.state_fusion import merge_taps, split_taps, tap_offsets

from .inputs import (
    BATCH,
    DIM,
    assert_near,
    assert_wrong_tensors_are_refused,
    fuse_by_gathering,
    fusion_inputs,
    generator,
    half_types,
)

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("height, width", [(1, 1), (2, 7), (5, 3), (8, 9)])
@pytest.mark.parametrize(("dilations", "size"), [((1, 3, 5), 3), ((1,), 3), ((2, 30_000), 3), ((1, 2), 5)])
def test_fusion_matches_gathering(height: int, width: int, dilations: tuple[int, ...], size: int) -> None:
    h, kernels, alpha = fusion_inputs(height, width, len(dilations), size)
    fused = state_fusion(h, kernels, alpha, dilations)
    assert fused.dtype == torch.float32
    assert_near(fused, fuse_by_gathering(h, kernels, alpha, dilations), 1e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 7)])
def test_fusion_gradcheck(height: int, width: int) -> None:
    h, kernels, alpha = fusion_inputs(height, width, 2)
    tensors = [t.double().requires_grad_() for t in (h, *kernels, alpha)]
    assert gradcheck(lambda h, k1, k2, alpha: state_fusion(h, (k1, k2), alpha, (1, 3)), tensors)


@pytest.mark.parametrize(
    "layout",
    [
        lambda h: h.contiguous(memory_format=torch.channels_last),
        lambda h: h.transpose(2, 3).contiguous().transpose(2, 3),
        lambda h: F.pad(h, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        lambda h: h[:1].expand_as(h),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded"],
)
def test_fusion_accepts_any_memory_layout(layout: Callable[[Tensor], Tensor]) -> None:
    h, kernels, alpha = fusion_inputs(6, 7)
    h = layout(h)
    assert not h.is_contiguous()
    assert_near(state_fusion(h, kernels, alpha), fuse_by_gathering(h, kernels, alpha, (1, 3, 5)), 1e-6)


@half_types
def test_fusion_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    h, kernels, alpha = fusion_inputs(6, 7)
    h, alpha, kernels = h.to(dtype), alpha.to(dtype), [k.to(dtype) for k in kernels]
    fused = state_fusion(h, kernels, alpha)
    assert fused.dtype == dtype
    assert torch.equal(fused, state_fusion(h.float(), [k.float() for k in kernels], alpha.float()).to(dtype))


def test_states_beyond_the_range_of_fp16_stay_finite_under_autocast() -> None:
    h = torch.full((1, DIM, 4, 4), 70000.0)
    kernels = [torch.ones(DIM, 1, 3, 3) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.float16):
        fused = state_fusion(h, kernels, torch.ones(3))
    assert fused.dtype == torch.float32
    assert_near(fused, 27 * h, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": [], "alpha": torch.ones(0), "dilations": ()}, "^kernels must hold at least one"),
        ({"kernels": [torch.ones(DIM, 1, 3, 3)]}, "1 kernels"),
        ({"alpha": torch.ones(2)}, r"alpha of shape \(2,\)"),
        ({"alpha": torch.ones(3, 1)}, r"alpha of shape \(3, 1\)"),
        ({"dilations": (1, 3)}, r"dilations \(1, 3\)"),
        ({"dilations": (1, 0, 5)}, r"dilations must be integers from 1 to 32767, got \(1, 0, 5\)"),
        ({"dilations": (1, 3.0, 5)}, r"dilations must be integers .* got \(1, 3.0, 5\)"),
        ({"dilations": (1, 2**61, 5)}, "dilations must be integers .* 2305843009213693952"),
        ({"kernels": [torch.ones(DIM + 1, 1, 3, 3)] * 3}, r"fusion kernels must have shape .* got \(5, 1, 3, 3\)"),
        ({"kernels": [torch.ones(DIM, 1, 2, 2)] * 3}, r"fusion kernels must have shape .* odd k, got \(4, 1, 2, 2\)"),
        ({"kernels": [torch.ones(DIM, 1, 3, 5)] * 3}, r"fusion kernels must have shape .* got \(4, 1, 3, 5\)"),
        ({"kernels": [torch.ones(DIM, 3, 3)] * 3}, r"fusion kernels must have shape .* got \(4, 3, 3\)"),
        ({"kernels": [torch.tensor(1.0)] * 3}, r"fusion kernels must have shape .* got \(\)"),
    ],
)
def test_fusion_refuses(change: dict[str, Any], message: str) -> None:
    h, kernels, alpha = fusion_inputs(4, 4)
    with pytest.raises(ValueError, match=message):
        state_fusion(**dict(h=h, kernels=kernels, alpha=alpha, dilations=(1, 3, 5)) | change)


def test_fusion_refuses_wrong_tensors() -> None:
    h, kernels, alpha = fusion_inputs(4, 4)

    def fuse(h: Tensor, alpha: Tensor, **kernel: Tensor) -> Tensor:
        return state_fusion(h, [kernels[0], *kernel.values(), kernels[2]], alpha)

    inputs = {"h": h, "kernels[1]": kernels[1], "alpha": alpha}
    assert_wrong_tensors_are_refused(fuse, inputs, h=[(DIM, 4, 4), (BATCH, DIM, 0, 4)])


branches = pytest.mark.parametrize(
    ("sizes", "dilations"), [((3, 3, 3), (1, 3, 5)), ((3,), (2,)), ((5, 3), (1, 2)), ((1, 1), (1, 4))]
)


@branches
def test_split_taps_merge_again(sizes: tuple[int, ...], dilations: tuple[int, ...]) -> None:
    count = len(tap_offsets(sizes, dilations)) // 2
    taps = torch.randn(count, DIM, generator=generator())
    kernels = split_taps(taps, sizes, dilations)
    assert [kernel.shape for kernel in kernels] == [(DIM, 1, size, size) for size in sizes]
    assert torch.equal(merge_taps(kernels, torch.ones(len(dilations)), dilations), taps)


@branches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taps_are_merged_alike_with_and_without_the_eager_shortcut(
    sizes: tuple[int, ...], dilations: tuple[int, ...], dtype: torch.dtype
) -> None:
    g = generator()
    kernels = [torch.randn(DIM, 1, size, size, generator=g).to(dtype).requires_grad_() for size in sizes]
    alpha = torch.randn(len(sizes), generator=g).requires_grad_()
    leaves = [alpha, *kernels]
    taps = merge_taps(kernels, alpha, dilations)
    grads = torch.autograd.grad(taps.square().sum(), leaves)
    assert type(taps.grad_fn).__name__ == "_MergeBackward"
    with FlopCounterMode(display=False):  # a mode: merged operation by operation
        expected = merge_taps(kernels, alpha, dilations)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
    assert_near(taps, expected, 1e-6)
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == other.dtype
        assert grad.is_contiguous()
        assert_near(grad, other, 1e-6 if grad.dtype == torch.float32 else 1e-2)


@branches
def test_merge_taps_gradcheck(sizes: tuple[int, ...], dilations: tuple[int, ...]) -> None:
    g = generator()
    kernels = [torch.randn(2, 1, size, size, generator=g).double().requires_grad_() for size in sizes]
    leaves = [torch.randn(len(sizes), generator=g).double().requires_grad_(), *kernels]
    assert gradcheck(lambda alpha, *kernels: merge_taps(kernels, alpha, dilations), leaves)
    assert gradgradcheck(lambda alpha, *kernels: merge_taps(kernels, alpha, dilations), leaves)


def test_fake_kernels_leave_nothing_behind() -> None:
    _, kernels, alpha = fusion_inputs(1, 1)
    with FakeTensorMode() as mode:
        fake = merge_taps([mode.from_tensor(kernel) for kernel in kernels], mode.from_tensor(alpha), (2, 4, 6))
    taps = merge_taps(kernels, alpha, (2, 4, 6))
    assert type(taps) is Tensor
    assert taps.shape == fake.shape
