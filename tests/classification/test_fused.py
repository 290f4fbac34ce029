"""The inference form: the same numbers in every form, never stale, never trained; no copies between operators."""

import math
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spatial_mamba import SpatialMamba, spatial_mamba_tiny
from spatial_mamba.classification.models import fused
from spatial_mamba.classification.models.flops import count_flops
from spatial_mamba.classification.models.trained import TrainedClassifier
from spatial_mamba.kernels import downsampling, use_backend
from spatial_mamba.kernels.backends import reference_serves
from spatial_mamba.kernels.build import cpu_features
from spatial_mamba.kernels.packed_linear import (
    can_pack,
    pack_weight,
    packed_downsampling,
    packed_linear,
    packed_mlp,
    unpack_weight,
)

from .micro_models import assert_near, filled_classifier, golden_fill, images, micro_backbone, with_statistics

packing = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="needs the cpu backend's matrix products")


# --- the same numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["cast, fused", "fused, cast"])
def test_golden_logits_with_other_weights(dtype: torch.dtype, order: str, golden: dict[str, np.ndarray]) -> None:
    model = golden_fill.fill_(spatial_mamba_tiny()).eval()
    model = model.to(dtype).fuse() if order == "cast, fused" else model.fuse().to(dtype)
    with torch.inference_mode():
        logits = model(golden_fill.image("a", (2, 3, 224, 224)).to(dtype))
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 3e-2}[dtype]  # the residuals of the golden values exceed float16
    assert_near(logits, torch.tensor(golden["tiny_logits_224"]), tolerance)


def test_a_fused_model_compiles_in_one_graph() -> None:
    model = with_statistics(filled_classifier(depths=(1, 1)))
    x = images()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model.fuse(), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert_near(compiled(x), expected, 1e-5)


@pytest.mark.parametrize("order", ["cast, fused", "fused, cast"])
def test_float16_weights(order: str) -> None:
    model = with_statistics(filled_classifier())
    expected = model(images())
    model = model.half().fuse() if order == "cast, fused" else model.fuse().half()
    assert_near(model(images().half()), expected, 1e-2)


def test_batch_norms_are_folded_with_their_statistics() -> None:
    model = with_statistics(filled_classifier())
    x = images(3, 3, 96, 64)
    expected = model(x)
    random_state = torch.get_rng_state()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.fuse().modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_near(model(x), expected, 1e-5)


def test_layers_with_and_without_bias() -> None:
    model = with_statistics(filled_classifier())
    block = model.layers[0].blocks[0]
    for parent, name in ((block.self_attention, "in_proj"), (block.self_attention, "out_proj"), (block.mlp, "fc1")):
        old = getattr(parent, name)
        setattr(parent, name, nn.Linear(old.in_features, old.out_features, bias=old.bias is None).eval())
    x = images()
    expected = model(x)
    assert_near(model.fuse()(x), expected, 1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 75), (100, 36)])
@pytest.mark.parametrize("limit", [1, 3000, 40_000])
def test_computing_hidden_activations_in_parts_changes_nothing(
    size: tuple[int, int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "can_pack", lambda weight: False)  # packed layers have parts of their own
    model = with_statistics(filled_classifier())
    x = images(2, 3, *size)
    expected = model(x)
    monkeypatch.setattr(fused, "HIDDEN_BYTES", {"cpu": limit, "cuda": limit})
    assert_near(model.fuse()(x), expected, 1e-5)


def test_parts_of_an_mlp_that_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_statistics(filled_classifier()).double().fuse()
    x = images(2, 3, 64, 64).double()
    expected = model(x)
    monkeypatch.setattr(fused, "HIDDEN_BYTES", {"cpu": 5000, "cuda": 5000})
    assert_near(model(x), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_calls_of_gpu_libraries(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls with a fused epilogue. CPUs have all except the convolution with ReLU, which is then skipped."""
    monkeypatch.setattr(fused, "can_pack", lambda weight: False)
    model = with_statistics(filled_classifier()).to(dtype).fuse()
    x = images(2, 3, 64, 64).to(dtype)
    expected = model(x)
    monkeypatch.setattr(fused, "calls_libraries", lambda x: True)
    assert_near(model(x), expected, 1e-12 if dtype == torch.float64 else 2e-2)
    convs = [module for module in model.modules() if isinstance(module, fused.FusedConv)]
    assert [conv.relu for conv in convs] == [True, True, False, True, False]
    assert [conv.relu_in_cudnn for conv in convs] == [conv.relu and dtype == torch.float64 for conv in convs]

    tokens = torch.randn(2, 3, 4, 8, dtype=dtype)
    before = tokens.clone()
    model.layers[0].blocks[0](tokens)
    assert torch.equal(tokens, before)


def test_backbone_fuses() -> None:
    backbone = with_statistics(golden_fill.fill_(micro_backbone()))
    expected = backbone(images())
    for feature, reference in zip(backbone.fuse()(images()), expected, strict=True):
        assert_near(feature, reference, 1e-5)


# --- what it refuses


def test_training_mode_is_refused() -> None:
    model = filled_classifier().train()
    with pytest.raises(RuntimeError, match="evaluation mode can be fused: call eval"):
        model.fuse()
    assert isinstance(model.patch_embed.conv1.norm, nn.BatchNorm2d)
    for part in ("patch_embed.conv1.norm", "layers.3.blocks.0.residual_sum"):
        model = filled_classifier(drop_path_rate=0.5).eval()
        model.get_submodule(part).train()
        with pytest.raises(RuntimeError, match=f"^{part} has hooks, is in training mode"):
            model.fuse()
    model.eval().fuse()
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match="a fused SpatialMamba cannot be trained"):
            whole.train()
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_are_not_loaded_into_a_fused_model() -> None:
    model = filled_classifier().eval()
    weights = model.state_dict()
    model.fuse()
    with pytest.raises(RuntimeError, match="a fused SpatialMamba loads no weights: load them before fuse"):
        model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"state_dict: holds the weights of a fused model, .* save the model before"):
        filled_classifier().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="a fused model has no weights of a known architecture: read it before fuse"):
        print(TrainedClassifier(model).architecture)


def test_gradients_of_images_are_refused() -> None:
    model = filled_classifier().eval().fuse()
    with pytest.raises(RuntimeError, match="a fused SpatialMamba has no gradients"):
        model(images().requires_grad_())
    assert model(images()).grad_fn is None


def test_forward_mode_is_that_of_the_model_before() -> None:
    model = filled_classifier(depths=(1, 1)).eval()
    x = images()
    expected = torch.func.jvp(model, (x,), (x.flip(-1),))
    for actual, wanted in zip(torch.func.jvp(model.fuse(), (x,), (x.flip(-1),)), expected, strict=True):
        assert_near(actual, wanted, 1e-5)


def test_other_norms_are_folded_or_refused_before_anything_has_changed() -> None:
    model = with_statistics(filled_classifier())
    expected = model(images())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert_near(deepcopy(model).fuse()(images()), expected, 1e-5)
    model.layers[0].downsample.conv[2].norm = nn.InstanceNorm2d(16).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match=r"downsample\.conv\.2\.norm has .* \(InstanceNorm2d\)"):
        model.fuse()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.train().training


def test_timm_leaves_the_model_as_it_is() -> None:
    model = with_statistics(filled_classifier())
    expected = model(images())
    assert torch.equal(timm.utils.reparameterize_model(model)(images()), expected)


def test_flops_are_counted_before_fusing() -> None:
    with pytest.raises(ValueError, match="count the FLOPs of a model before fuse"):
        count_flops(filled_classifier().eval().fuse(), images())


def test_an_empty_batch_and_a_failed_move(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled_classifier().eval().fuse()
    expected = model(images())
    monkeypatch.setattr(fused, "HIDDEN_BYTES", {"cpu": 1, "cuda": 1})
    assert model(images()[:0]).shape == (0, 5)

    def fail(tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        model._apply(fail)
    assert_near(model.to(torch.float32)(images()), expected, 3e-6)  # a smaller part of an MLP at a time


def test_autocast_is_refused() -> None:
    model = filled_classifier().eval().fuse()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"\.to\(torch\.bfloat16\)"):
        model(images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_downsampling_without_biases(dtype: torch.dtype) -> None:
    model = filled_classifier().eval()
    expand = model.layers[0].downsample.conv[0]
    expand.conv = nn.Conv2d(expand.conv.in_channels, expand.conv.out_channels, 1, bias=False)
    expected = model.double()(images().double())
    assert_near(model.fuse().to(dtype)(images().to(dtype)), expected, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_downsampling_refuses_tokens_of_another_dtype(dtype: torch.dtype) -> None:
    downsample = filled_classifier().eval().fuse().to(dtype).layers[0].downsample
    with pytest.raises(TypeError, match="a fused model computes in the dtype of its weights"):
        downsample(torch.ones(1, 4, 4, downsample.expand.weight.shape[1], dtype=torch.float16))


def test_fusing_again_and_copying_change_nothing() -> None:
    model = filled_classifier().eval().fuse()
    expected = model(images())
    assert model.fuse() is model
    assert torch.equal(model(images()), expected)
    assert torch.equal(deepcopy(model)(images()), expected)


# --- memory


def copies(profile: torch.profiler.profile, elements: int) -> list[tuple[str, int]]:
    """Operations that only move or set tensors of at least so many elements, also within operators: names and elements.

    The profiler records no sizes for `cat`. Its elements are half the bytes of its output, for half precision. One
    operation is left out: PyTorch's linear layers on CPUs copy their bias to the output and add to it.
    """
    found = []
    for event in profile.events():
        in_linear = event.cpu_parent is not None and event.cpu_parent.name == "aten::addmm"
        if event.name == "aten::cat":  # `stack`, too, calls it
            found.append((event.name, event.cpu_memory_usage // 2))
        elif event.name in ("aten::copy_", "aten::fill_", "aten::zero_", "aten::index_select") and not in_linear:
            found.append((event.name, math.prod(event.input_shapes[0])))
    return [(name, size) for name, size in found if size >= elements]


def convolves_in_bfloat16() -> bool:
    """Whether PyTorch uses oneDNN for convolutions in bfloat16, by the query that PyTorch makes itself.

    True on x86 with AVX-512 and on Arm with bfloat16 instructions, false with only AVX2.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(reference_serves(torch.zeros(())), reason="the reference implementation permutes and copies")
@pytest.mark.parametrize(
    ("mode", "autocast"),
    [("inference", False), ("inference", True), ("training", False), ("training", True), ("fused", False)],
)
def test_nothing_is_copied_between_operators(mode: str, autocast: bool) -> None:
    model = filled_classifier(dims=16, depths=(2, 1), drop_path_rate=0.3).train(mode == "training")
    if mode == "fused":
        model.fuse()
    x = images(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    smallest_map = 16 * 8 * 8 * 32  # the tokens of the last stage
    assert max(p.numel() for p in model.parameters()) < smallest_map
    with (
        torch.profiler.profile(record_shapes=True, profile_memory=True, acc_events=True) as profile,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.set_grad_enabled(mode == "training"),
    ):
        logits = model(x)
        if mode == "training":
            F.cross_entropy(logits.float(), torch.arange(16) % 5).backward()
    expected = []
    if autocast:
        sizes = [16 * 3 * 64 * 64, smallest_map]  # the images; and the mean sums in float32
        if mode == "training" and not convolves_in_bfloat16():
            gradients = 3 * [16 * 8 * 32 * 32] + [16 * 64 * 16 * 16]  # PyTorch's own, here in the stem, start from zero
            expected += [(name, size) for name in ("aten::zero_", "aten::fill_") for size in gradients]
        expected += [("aten::copy_", size) for size in sizes]
    assert sorted(copies(profile, smallest_map)) == sorted(expected)


def test_peak_memory_is_linear_in_pixels() -> None:
    from spatial_mamba.kernels.benchmark.measure import peak_memory

    model = SpatialMamba(dims=8, depths=(1, 1), num_classes=2).eval().fuse()

    def peak(size: int) -> int:
        x = torch.zeros(1, 3, size, size)
        with torch.inference_mode():
            return peak_memory(lambda: model(x), torch.device("cpu"))

    small, large = peak(256), peak(512)
    assert 3.5 < large / small < 4.1


# --- packed layers, compared with the plain ones


def pack(weight: Tensor) -> Tensor:
    """Packs weights as on a machine with matrix products of this dtype, even if this machine has none."""
    return torch.ops.spatial_mamba_cpu.pack_weight(weight)


@packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_packed_only_where_the_processor_has_matrix_products(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 8).to(dtype)
    assert can_pack(weight) == torch.ops.spatial_mamba_cpu.can_pack(dtype)
    assert can_pack(weight) or dtype != torch.float32  # which every processor has
    if dtype == torch.bfloat16 and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert can_pack(weight) == ("avx512_bf16" in cpu_features())  # AMX is not needed
    with use_backend("torch"):
        assert not can_pack(weight)
    if can_pack(weight):
        assert torch.equal(pack_weight(weight), pack(weight))
    else:
        with pytest.raises(ValueError, match=rf"\(64, 8\), {dtype}, on cpu cannot be packed"):
            pack_weight(weight)
    layer = fused.PackedLinear(weight, None)
    assert layer.packed == can_pack(weight)
    assert torch.equal(layer.weight, pack(weight) if layer.packed else weight)


@packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 16, 64), (7, 34, 5), (501, 48, 130), (501, 64, 130), (0, 16, 64)]
)
def test_packed_layers_match_the_library(dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    x, residual = torch.randn(1, tokens, 1, inputs).to(dtype), torch.randn(1, tokens, 1, outputs).to(dtype)
    bias, scale, shift = (torch.randn(size).to(dtype) for size in (outputs, inputs, inputs))
    exact = [t.double() for t in (x, weight, bias, scale, shift, residual)]
    normed = F.layer_norm(exact[0], (inputs,), exact[3], exact[4])
    packed = pack(weight)
    assert torch.equal(unpack_weight(packed, outputs), weight)
    tolerance = 16 * torch.finfo(dtype).eps
    results = {
        "plain": (packed_linear(x, packed, outputs), F.linear(exact[0], exact[1])),
        "bias, relu": (
            packed_linear(x, packed, outputs, bias, relu=True),
            F.linear(exact[0], exact[1], exact[2]).relu(),
        ),
        "all": (
            packed_linear(x, packed, outputs, bias, scale, shift, residual=residual),
            exact[5] + F.linear(normed, exact[1], exact[2]),
        ),
    }
    for actual, expected in results.values():
        assert actual.dtype == dtype and actual.shape == expected.shape
        if tokens:
            assert_near(actual, expected, tolerance)


@packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("tokens", "dim"), [(3, 8), (450, 48), (450, 64)])
def test_packed_mlp_matches_the_library(dtype: torch.dtype, backend: str, tokens: int, dim: int) -> None:
    torch.manual_seed(0)
    shapes = [(tokens, dim), (dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    x, scale, shift, w1, b1, w2, b2 = (torch.randn(shape).to(dtype) / shape[-1] ** 0.25 for shape in shapes)
    with use_backend(backend):
        actual = packed_mlp(x, scale, shift, 1e-5, *(pack(w1), b1, pack(w2), b2))
    exact = [t.double() for t in (x, scale, shift, w1, b1, w2, b2)]
    normed = F.layer_norm(exact[0], (dim,), exact[1], exact[2])
    expected = exact[0] + F.linear(F.gelu(F.linear(normed, *exact[3:5])), *exact[5:7])
    assert_near(actual, expected, 16 * torch.finfo(dtype).eps)


@packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("shape", [(1, 9, 40), (3, 12, 7), (1, 1, 1), (0, 4, 4)], ids=str)
def test_packed_downsampling_matches_the_library(dtype: torch.dtype, backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dim, hidden, outputs = 32, 72, 70
    shapes = [(*shape, dim), (hidden, dim), (hidden,), (hidden, 1, 3, 3), (hidden,), (outputs, hidden), (outputs,)]
    x, w1, b1, conv, b2, w3, b3 = (torch.randn(size).to(dtype) / size[-1] ** 0.5 for size in shapes)
    with use_backend(backend):
        actual = packed_downsampling(x, pack(w1), b1, conv, b2, pack(w3), b3)
    exact = [t.double() for t in (x, w1, b1, conv, b2, w3, b3)]
    maps = F.linear(*exact[:3]).relu().permute(0, 3, 1, 2)
    sampled = F.conv2d(maps, *exact[3:5], stride=2, padding=1, groups=hidden).relu().permute(0, 2, 3, 1)
    expected = F.linear(sampled, *exact[5:7])
    assert actual.dtype == dtype and actual.shape == expected.shape
    if len(x):
        assert_near(actual, expected, 16 * torch.finfo(dtype).eps)


@packing
def test_weights_may_lie_anywhere_in_memory() -> None:
    x, packed = torch.randn(3, 8), pack_weight(torch.randn(64, 8))
    bias = torch.randn(128)
    expected = packed_linear(x, packed, 64, bias[::2].clone())
    assert torch.equal(packed_linear(x, packed, 64, bias[::2]), expected)


@packing
def test_packed_weights_that_come_to_a_machine_without_matrix_products_are_unpacked() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(64, 8).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_pack(weight)
        assert_near(packed_linear(x, pack(weight), 64), F.linear(x, weight), 2e-2)


@packing
def test_flops_of_packed_layers() -> None:
    x, weight = torch.randn(3, 8), torch.randn(64, 8)
    with FlopCounterMode(display=False) as plain:
        F.linear(x, weight)
    with FlopCounterMode(display=False) as packed:
        packed_linear(x, pack_weight(weight), 64)
    assert packed.get_total_flops() == plain.get_total_flops() > 0

    maps, conv, bias = torch.randn(2, 5, 4, 8), torch.randn(64, 1, 3, 3), torch.randn(64)
    with use_backend("cpu"), FlopCounterMode(display=False) as plain:
        downsampling(maps, weight, bias, conv, bias, weight.T, bias[:8])
    with FlopCounterMode(display=False) as packed:
        packed_downsampling(maps, pack_weight(weight), bias, conv, bias, pack_weight(weight.T.contiguous()), bias[:8])
    assert packed.get_total_flops() == plain.get_total_flops()


@packing
def test_packed_operators_pass_opcheck() -> None:
    x, weight, ones = torch.randn(3, 64), pack_weight(torch.randn(64, 64)), torch.ones(64)
    checks = ("test_schema", "test_faketensor")
    linear = (x, weight, ones, ones, ones, x, 64, 1e-5, False)
    torch.library.opcheck(torch.ops.spatial_mamba.packed_linear.default, linear, test_utils=checks)
    mlp = (x, ones, ones, weight, ones, weight, ones, 1e-5)
    torch.library.opcheck(torch.ops.spatial_mamba.packed_mlp.default, mlp, test_utils=checks)
    downsampling = (torch.randn(2, 5, 4, 64), weight, ones, torch.randn(64, 1, 3, 3), ones, weight, ones)
    torch.library.opcheck(torch.ops.spatial_mamba.packed_downsampling.default, downsampling, test_utils=checks)


@packing
def test_packed_gelu_is_exact_to_rounding_over_its_whole_range() -> None:
    values = torch.linspace(-12, 12, 40 * 64).view(40, 64)
    nothing, identity = pack_weight(torch.zeros(64, 64)), pack_weight(torch.eye(64))
    x, ones, zeros = torch.zeros(1, 64), torch.ones(64), torch.zeros(64)
    # The values enter as the biases of the hidden layer.
    actual = [packed_mlp(x, ones, zeros, 1e-5, nothing, row.contiguous(), identity, zeros) for row in values]
    assert (torch.cat(actual).double() - F.gelu(values.double())).abs().max() < 1e-6


@packing
def test_packed_layers_name_what_is_wrong() -> None:
    x, packed = torch.zeros(3, 8), pack_weight(torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"packed must have shape \(blocks, inputs, 64\) with .* inputs = 6, got"):
        packed_linear(torch.zeros(3, 6), packed, 4)
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 4\)"):
        packed_linear(x, packed, 4, residual=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="both norm_weight and norm_bias"):
        packed_linear(x, packed, 4, norm_weight=torch.ones(8))
    with pytest.raises(ValueError, match="relu or a residual, not both"):
        packed_linear(x, packed, 4, relu=True, residual=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"conv_weight must have shape .* hidden = 4, got \(4, 9\)"):
        packed_downsampling(x[None, None], packed, x[0, :4], torch.zeros(4, 9), x[0, :4], packed, x[0, :4])
    with pytest.raises(TypeError, match=r"packed must have the dtype of x, torch\.bfloat16"):
        packed_linear(x.bfloat16(), packed, 4)
    with pytest.raises(ValueError, match=r"\(4, 8\), torch\.float64, on cpu cannot be packed"):
        pack_weight(torch.zeros(4, 8).double())


# --- on other processors


@pytest.mark.slow
def test_what_depends_on_the_processor_holds_with_avx2_alone() -> None:
    """PyTorch and oneDNN choose their instructions once per process, so the tests run again in a new one.

    On Arm the variables have no effect, and the tests only run a second time.
    """
    capabilities = "torch.backends.cpu.get_cpu_capability(), torch.ops.mkldnn._is_mkldnn_bf16_supported()"
    script = f"import pytest, sys, torch; print({capabilities}); sys.exit(pytest.main())"
    tests = "copied and True or packed_layers_match or packed_mlp_matches or packed_downsampling_matches"
    options = ["-q", "-p", "no:cacheprovider", "-k", tests]
    result = subprocess.run(
        [sys.executable, "-c", script, *options, "tests/classification/test_fused.py"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("AVX2 False\n") or platform.machine() != "x86_64"


# --- on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_golden_logits_on_a_gpu_and_in_a_cuda_graph(dtype: torch.dtype, golden: dict[str, np.ndarray]) -> None:
    model = golden_fill.fill_(spatial_mamba_tiny()).eval().to("cuda", dtype).fuse()
    x = golden_fill.image("a", (2, 3, 224, 224)).to("cuda", dtype)
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]  # TF32 in the convolutions
    expected = torch.tensor(golden["tiny_logits_224"])
    with torch.inference_mode():
        assert_near(model(x).cpu(), expected, tolerance)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_near(logits.cpu(), expected, tolerance)


@pytest.mark.gpu
@needs_gpu
def test_golden_logits_under_the_compiler_on_a_gpu(golden: dict[str, np.ndarray]) -> None:
    model = golden_fill.fill_(spatial_mamba_tiny()).eval().cuda().fuse()
    torch._dynamo.reset()
    with torch.inference_mode():
        logits = torch.compile(model, mode="reduce-overhead")(golden_fill.image("a", (2, 3, 224, 224)).cuda())
    assert_near(logits.cpu(), torch.tensor(golden["tiny_logits_224"]), 2e-3)
