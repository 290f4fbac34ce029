"""The models: golden values, sizes, precision, compilation, timm, initialisation, weights that are never stale."""

import importlib.util
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from spatial_mamba import SpatialMamba, SpatialMambaBackbone, spatial_mamba_tiny
from spatial_mamba.classification.export.form import export_form
from spatial_mamba.classification.models import WeightsError
from spatial_mamba.kernels import selective_scan, state_fusion, use_backend
from spatial_mamba.kernels.backends import reference_serves

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PARAMETERS = {"tiny": 26_748_862, "small": 43_074_280, "base": 95_745_592}
CONFIGS = {
    "tiny": dict(dims=64, depths=(2, 4, 8, 4)),
    "small": dict(dims=64, depths=(2, 4, 21, 5)),
    "base": dict(dims=96, depths=(2, 4, 21, 5)),
}
MICRO = dict(dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.0)

half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def load_fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_fill = load_fill()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "tiny.npz") as values:
        return dict(values)


def micro_classifier(**changes: Any) -> SpatialMamba:
    """A small classifier at its initial values."""
    torch.manual_seed(0)
    return SpatialMamba(**MICRO | dict(num_classes=5) | changes)


def filled_classifier(**changes: Any) -> SpatialMamba:
    """A small classifier with weights under which every part of it matters."""
    return golden_fill.fill_(micro_classifier(**changes))


def micro_backbone(**changes: Any) -> SpatialMambaBackbone:
    torch.manual_seed(0)
    return SpatialMambaBackbone(**MICRO | changes)


def images(*shape: int) -> Tensor:
    return golden_fill.image("test", shape or (2, 3, 64, 64))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal shapes, and equal values within ``tolerance`` of the largest magnitude expected."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


def train_step(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass through ``model`` as it is, training or not."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# --- the published model


@pytest.mark.parametrize("variant", PARAMETERS)
def test_state_dicts_and_parameter_counts_are_the_published_ones(variant: str) -> None:
    expected = json.loads((GOLDEN / f"state_dict_{variant}.json").read_text())
    with torch.device("meta"):
        classifier = timm.create_model(f"spatial_mamba_{variant}")
        backbone = SpatialMambaBackbone(**CONFIGS[variant])
    for name, model in (("classifier", classifier), ("backbone", backbone)):
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected[name]
    assert sum(p.numel() for p in classifier.parameters()) == PARAMETERS[variant]


def test_golden_logits(golden: dict[str, np.ndarray]) -> None:
    model = golden_fill.fill_(spatial_mamba_tiny()).eval()
    with torch.no_grad():
        logits = model(golden_fill.image("a", (2, 3, 224, 224)))
    assert_near(logits, torch.from_numpy(golden["tiny_logits_224"]), 1e-4)


def test_golden_features(golden: dict[str, np.ndarray]) -> None:
    model = golden_fill.fill_(SpatialMambaBackbone(**CONFIGS["tiny"])).eval()
    with torch.no_grad():
        maps = model(golden_fill.image("b", (1, 3, 128, 96)))
    assert len(maps) == 4
    for i, features in enumerate(maps):
        assert_near(features, torch.from_numpy(golden[f"tiny_feature{i}_128x96"]), 1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "zero"), [(torch.float32, 1e-3, 1e-5), (torch.float64, 1e-6, 1e-12)], ids=str
)
def test_golden_training_step(golden: dict[str, np.ndarray], dtype: torch.dtype, tolerance: float, zero: float) -> None:
    model = golden_fill.fill_(spatial_mamba_tiny(drop_path_rate=0.0)).to(dtype).train()
    logits = model(golden_fill.image("c", (4, 3, 64, 64)).to(dtype))
    loss = F.cross_entropy(logits, torch.arange(4) * 37 % 1000)
    loss.backward()

    assert loss.item() == pytest.approx(golden["tiny_train_64_loss"].item(), rel=tolerance)
    assert_near(logits, torch.from_numpy(golden["tiny_train_64_logits"]), tolerance)

    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    names = golden["tiny_train_64_grad_names"].tolist()
    assert sorted(names) == sorted(gradients)
    norms, heads = golden["tiny_train_64_grad_norms"], golden["tiny_train_64_grad_head4"]
    failures = []
    for name, norm, head in zip(names, norms.tolist(), heads, strict=True):
        gradient = gradients[name]
        if norm < 1e-10:  # a bias in front of a BatchNorm, which takes the mean off again
            if gradient.norm() > zero:
                failures.append(f"{name}: norm {gradient.norm():.3g} instead of 0")
            continue
        first = gradient.flatten()[:4].numpy()
        norm_error = abs(gradient.norm().item() - norm) / norm
        head_error = np.abs(first - head[: len(first)]).max() / norm
        # The three gradients of an alpha are large sums that cancel. How exactly float32 gives them depends on the
        # processor: the error is 8e-4 with fused multiply-adds, 2e-3 without.
        allowed = 4 * tolerance if name.endswith(".alpha") else tolerance
        if max(norm_error, head_error) > allowed:
            failures.append(f"{name}: norm off by {norm_error:.3g}, first values by {head_error:.3g}")
    assert not failures


# --- sizes


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (64, 96)])
def test_any_image_size(height: int, width: int) -> None:
    x = images(2, 3, height, width)
    with torch.no_grad():
        assert filled_classifier()(x).shape == (2, 5)
        maps = golden_fill.fill_(micro_backbone())(x)
    for i, features in enumerate(maps):
        stride = 4 * 2**i
        assert features.shape == (2, 8 * 2**i, math.ceil(height / stride), math.ceil(width / stride))
        assert features.is_contiguous()
        assert features.isfinite().all()
    assert len(maps) == 4


def test_one_out_index_and_no_weights_to_start_from() -> None:
    assert micro_backbone(out_indices=2, pretrained="").out_indices == (2,)


def test_out_indices_choose_among_the_same_maps() -> None:
    everything = golden_fill.fill_(micro_backbone()).eval()
    chosen = golden_fill.fill_(micro_backbone(out_indices=(1, 3))).eval()
    assert {name for name, _ in chosen.named_children() if "outnorm" in name} == {"outnorm1", "outnorm3"}
    with torch.no_grad():
        maps, expected = chosen(images()), everything(images())
    torch.testing.assert_close(maps, (expected[1], expected[3]))


def test_a_backbone_ends_with_its_last_map() -> None:
    """Under DDP, parameters without a gradient are an error."""
    everything = golden_fill.fill_(micro_backbone()).eval()
    chosen = micro_backbone(out_indices=(0, 2)).eval()
    assert chosen.num_features == chosen.feature_info[-1]["num_chs"] == 32
    chosen.load_state_dict({name: everything.state_dict()[name] for name in chosen.state_dict()})
    maps = chosen(images())
    torch.testing.assert_close(maps, everything(images())[0:3:2])
    sum(features.square().sum() for features in maps).backward()
    assert all(parameter.grad is not None for parameter in chosen.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_indices": (0, 4)}, r"out_indices .* \(0, 4\)"),
        ({"out_indices": (-1,)}, r"out_indices .* \(-1,\)"),
        ({"out_indices": (2, 1)}, r"out_indices .* \(2, 1\)"),
        ({"out_indices": (1, 1)}, r"out_indices .* \(1, 1\)"),
        ({"out_indices": ()}, r"out_indices .* \(\)"),
        ({"d_state": 2}, "d_state must be 1, got 2"),
        ({"dims": 9}, "dims.* even number, got 9"),
        ({"dims": 0}, "dims.* even number, got 0"),
        ({"depths": (1, 0)}, r"depths .* \(1, 0\)"),
        ({"depths": ()}, r"depths .* \(\)"),
    ],
)
def test_backbone_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_backbone(**change)


# --- precision


class RecordMixers(TorchDispatchMode):
    """Collects what the mixers' scans return, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.spatial_mamba.spatial_mixer.default:
            self.outputs.append(result[3])
        return result


needs_native_mixer = pytest.mark.skipif(
    reference_serves(torch.zeros(())), reason="the definition serves here: there is no operator to look into"
)


@needs_native_mixer
@half_types
def test_autocast_is_close_to_float32_and_keeps_what_the_scan_returns_in_it(dtype: torch.dtype) -> None:
    model = filled_classifier().eval()
    with torch.no_grad():
        expected = model(images())
        with torch.autocast("cpu", dtype=dtype), RecordMixers() as record:
            logits = model(images())
    assert [y.dtype for y in record.outputs] == 4 * [torch.float32]
    assert logits.dtype == dtype
    assert_near(logits, expected, 16 * torch.finfo(dtype).eps)


@needs_native_mixer
def test_initial_fusion_kernels_do_not_overflow_fp16() -> None:
    # What u, B and C hold fits into half precision; their product, grown 27-fold by kernels of 1, does not.
    model = micro_classifier().eval()
    for stage in model.layers:
        mixer = stage.blocks[0].self_attention
        with torch.no_grad():
            mixer.in_proj.weight[: mixer.inner_dim] *= 5e3
            mixer.x_proj_weight[: mixer.dt_rank] = 0  # steps as at the start, whatever the tokens
            mixer.x_proj_weight[mixer.dt_rank :] *= 10
    with torch.no_grad():
        expected = model(10 * images())
        with torch.autocast("cpu", dtype=torch.float16), RecordMixers() as record:
            logits = model(10 * images())
    assert min(y.abs().max() for y in record.outputs) > torch.finfo(torch.float16).max
    assert logits.isfinite().all()
    assert_near(logits, expected, 0.05)


@half_types
def test_half_precision_weights_run(dtype: torch.dtype) -> None:
    x = images()
    with torch.no_grad():
        expected = filled_classifier()(x)
    model = filled_classifier().to(dtype)
    logits = model(x.to(dtype))
    assert logits.dtype == dtype
    assert_near(logits, expected, 32 * torch.finfo(dtype).eps)
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- transforms, compilation and activation checkpointing


def test_transforms_of_torch_func() -> None:
    """Per-sample gradients and derivatives in forward mode are those of the reverse mode."""
    model = filled_classifier(depths=(1, 1)).double().eval()
    x, direction = images(2, 3, 32, 32).double(), images(2, 3, 32, 32).double().flip(-1)
    labels = torch.tensor([0, 2])
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, labels)
    for i in range(2):
        expected = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]), weights.values())
        for name, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(per_sample[name][i], gradient, rtol=1e-9, atol=1e-9)

    logits, tangent = torch.func.jvp(model, (x,), (direction,))
    jacobian = torch.func.jacrev(model)(x)  # (2, classes, 2, 3, 32, 32)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(tangent, torch.einsum("bcnxyz,nxyz->bc", jacobian, direction), rtol=1e-9, atol=1e-9)
    assert tangent.abs().min() > 0


def test_traces_for_any_size() -> None:
    """As TensorBoard, fvcore and other tools trace a model."""
    model = SpatialMamba(dims=8, depths=(1, 1), num_classes=3).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (2, 3, 96, 64), (1, 3, 64, 33)):
            images = torch.randn(shape)
            assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_for_any_size(training: bool) -> None:
    """As torchvision's feature extraction and PyTorch's quantization do."""
    model = filled_classifier(depths=(1, 1)).train(training)
    node = "layers.1.blocks.0.mlp.fc2"
    traced, extractor = torch.fx.symbolic_trace(model), create_feature_extractor(model, [node, "head"])
    for shape in ((1, 3, 64, 64), (2, 3, 96, 33)):
        x = images(*shape)
        logits, features = model(x), extractor(x)
        assert torch.equal(traced(x), logits)
        assert torch.equal(features["head"], logits)
        assert features[node].shape == (shape[0], math.ceil(shape[2] / 8), math.ceil(shape[3] / 8), 16)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_compiles_in_one_graph(use_checkpoint: bool) -> None:
    model = filled_classifier(depths=(1, 1), use_checkpoint=use_checkpoint)
    x = images(2, 3, 32, 32)
    expected = train_step(model, x)
    torch._dynamo.reset()  # a graph of another test must not be counted as a recompilation
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = F.cross_entropy(compiled(x), torch.arange(2))
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_same_step((loss.detach(), gradients), expected)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_activation_checkpointing_changes_nothing_but_memory(drop_path_rate: float) -> None:
    model = filled_classifier(depths=(2, 2), drop_path_rate=drop_path_rate).train()
    start = deepcopy(model.state_dict())
    block_calls = []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, args: block_calls.append(module))

    def step_with(enable: bool) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[str, Tensor], int]:
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        block_calls.clear()
        step = train_step(model, images(4, 3, 32, 32))
        return step, deepcopy(model.state_dict()), len(block_calls)

    expected, expected_state, calls = step_with(False)
    assert calls == 4
    step, state, calls = step_with(True)
    assert calls == 8  # every block once more in the backward pass
    assert_same_step(step, expected)
    torch.testing.assert_close(state, expected_state)
    assert step_with(False)[-1] == 4

    other_seed = train_step(model, images(4, 3, 32, 32), seed=1)[0]
    assert (other_seed.item() != expected[0].item()) == (drop_path_rate > 0)


# --- timm


def test_timm_lists_the_models() -> None:
    assert timm.list_models("spatial_mamba*") == [f"spatial_mamba_{v}" for v in ("base", "small", "tiny")]


@pytest.fixture(scope="module")
def gray_tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("spatial_mamba_tiny", num_classes=10, in_chans=1).eval()


@torch.no_grad()
def test_timm_feature_and_head_interface(gray_tiny: nn.Module) -> None:
    x = images(2, 1, 64, 96)
    tokens = gray_tiny.forward_features(x)
    assert tokens.shape == (2, 2, 3, gray_tiny.num_features)
    features = gray_tiny.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, gray_tiny.head_hidden_size)
    torch.testing.assert_close(features, tokens.mean(dim=(1, 2)))
    logits = gray_tiny.forward_head(tokens)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, gray_tiny.get_classifier()(features))
    torch.testing.assert_close(gray_tiny(x), logits)


def test_timm_metadata(gray_tiny: nn.Module) -> None:
    cfg = gray_tiny.pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["interpolation"] == "bicubic"
    assert cfg["input_size"] == (3, 224, 224)
    assert gray_tiny.get_submodule(cfg["classifier"]) is gray_tiny.get_classifier()
    assert gray_tiny.get_submodule(cfg["first_conv"]).in_channels == 1
    assert gray_tiny.no_weight_decay() == set()
    assert [info["num_chs"] for info in gray_tiny.feature_info] == [64, 128, 256, 512]


@torch.no_grad()
def test_reset_classifier() -> None:
    model = filled_classifier().double().eval()
    x = images(2, 3, 32, 64).double()
    tokens = model.forward_features(x)

    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), tokens.mean(dim=(1, 2)))

    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model(x).shape == (2, 7)

    model.reset_classifier(7, global_pool="")
    torch.testing.assert_close(model(x), model.get_classifier()(tokens))
    model.reset_classifier(0, global_pool="")
    torch.testing.assert_close(model(x), tokens)
    with pytest.raises(ValueError, match=r"global_pool .*'max'"):
        model.reset_classifier(7, global_pool="max")


def test_timm_pretrained_is_an_error_while_no_weights_are_hosted() -> None:
    with pytest.raises(RuntimeError, match="spatial_mamba_tiny"):
        timm.create_model("spatial_mamba_tiny", pretrained=True)


@torch.no_grad()
def test_forward_intermediates_are_the_features_in_front_of_downsampling() -> None:
    model, x = filled_classifier().eval(), images(2, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 8 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    torch.testing.assert_close(model.norm(maps[3].permute(0, 2, 3, 1)), final)

    last, chosen = model.forward_intermediates(x, indices=[-2, 1], norm=True, stop_early=True, output_fmt="NHWC")
    torch.testing.assert_close(chosen, [m.permute(0, 2, 3, 1) for m in maps[1:3]])
    torch.testing.assert_close(last, chosen[-1])
    [normed] = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(normed, final)
    with pytest.raises(ValueError, match=r"output_fmt .* 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_features_only_gives_the_maps_asked_for_of_the_same_network() -> None:
    x = images(1, 3, 64, 64)
    classifier = filled_classifier().eval()
    expected = classifier.forward_intermediates(x, intermediates_only=True)
    options = MICRO | dict(features_only=True, out_indices=(0, 2))
    features = timm.create_model("spatial_mamba_tiny", **options).eval()
    assert features.feature_info.channels() == [8, 32]
    assert features.feature_info.reduction() == [4, 16]
    assert not any("layers.3" in name or "head" in name for name, _ in features.named_parameters())
    own = features.model.state_dict()
    features.model.load_state_dict({k: v for k, v in classifier.state_dict().items() if k in own})
    torch.testing.assert_close(features(x), [expected[0], expected[2]])


def test_layer_groups_run_from_the_stem_to_the_head() -> None:
    model = micro_classifier(depths=(1, 2))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    names = [
        "patch_embed.conv1.conv.weight",
        *(f"layers.{b}.ln_1.weight" for b in ("0.blocks.0", "1.blocks.0", "1.blocks.1")),
    ]
    assert [layers[name] for name in [*names, "head.weight"]] == [0, 1, 2, 3, 4]
    assert layers["layers.0.downsample.conv.0.conv.weight"] == 1
    assert layers["norm.weight"] == 3
    stages = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(stages.values())) == [0, 1, 2, 3]
    backbone = micro_backbone(depths=(1, 1), out_indices=(0, 1))
    layers = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    assert (layers["outnorm0.weight"], layers["outnorm1.weight"]) == (1, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_timm_makes_models_on_a_device_in_a_dtype(device: str) -> None:
    model = timm.create_model("spatial_mamba_tiny", **MICRO, device=device, dtype=torch.bfloat16)
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {t.device.type for t in tensors} == {device}
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    x = images(1, 3, 32, 32).to(device, torch.bfloat16)
    assert model.eval()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", PARAMETERS)
def test_metadata_names_the_published_accuracy(variant: str) -> None:
    cfg = timm.get_pretrained_cfg(f"spatial_mamba_{variant}")
    assert f"published_top1={ {'tiny': 83.5, 'small': 84.6, 'base': 85.3}[variant] }" in cfg.notes
    assert (cfg.crop_pct, cfg.interpolation, cfg.license) == (0.875, "bicubic", "apache-2.0")


def test_timms_training_and_validation_take_the_model(tmp_path: Path) -> None:
    """The calls that timm's train.py and validate.py make, in their order."""
    options = dict(num_classes=4, in_chans=3, drop_rate=0.0, drop_path_rate=0.1, global_pool=None, bn_momentum=None)
    model = timm.create_model("spatial_mamba_tiny", pretrained=False, **MICRO | options, checkpoint_path="")
    model.set_grad_checkpointing(enable=True)
    data = timm.data.resolve_data_config({"img_size": 32}, model=model)
    assert (data["input_size"], data["crop_pct"], data["mean"]) == ((3, 32, 32), 0.875, (0.485, 0.456, 0.406))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == [0.5**n for n in range(5, -1, -1)]  # the stem, four blocks, the head
    ema = ModelEmaV3(model, decay=0.5)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    x, target = images(4, 3, 32, 32), torch.arange(4)
    losses = []
    for epoch in range(3):
        loss = F.cross_entropy(model.train()(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses.append(loss.item())
        saver.save_checkpoint(epoch, metric=-loss.item())
    assert losses[-1] < losses[0]
    best = tmp_path / "model_best.pth.tar"
    validated = timm.create_model("spatial_mamba_tiny", **MICRO | options, checkpoint_path=best)  # of its EMA
    with torch.no_grad():
        torch.testing.assert_close(validated.eval()(x), ema.module.eval()(x))


# --- ablations of the fusion


def fused_by_hand(model: SpatialMamba, x: Tensor) -> Tensor:
    """The core of the first block in the operators' own terms, for the tokens that it gets."""
    ssm = model.layers[0].blocks[0].self_attention
    kernels, alpha, dilations = ssm.state_fusion.branches(ssm.Ds)
    u = F.silu(F.conv2d(x.permute(0, 3, 1, 2), ssm.conv2d.weight, ssm.conv2d.bias, padding=1, groups=ssm.inner_dim))
    r, B, C = torch.einsum("kd,bdhw->bkhw", ssm.x_proj_weight, u).split([ssm.dt_rank, 1, 1], dim=1)
    delta = torch.einsum("dr,brhw->bdhw", ssm.dt_projs_weight, r)
    states = selective_scan(
        u.flatten(2),
        delta.flatten(2),
        -ssm.A_logs.exp(),
        B.flatten(2),
        delta_bias=ssm.dt_projs_bias,
        delta_softplus=True,
    )
    states = states.view(u.shape)
    if ssm.state_fusion.dilations:
        states = state_fusion(states, kernels, alpha, dilations)
    return (C * states + ssm.Ds[:, None, None] * u).permute(0, 2, 3, 1)


@needs_native_mixer
@pytest.mark.parametrize(
    "fusion",
    [
        {"fusion_dilations": ()},
        {"fusion_dilations": (2,)},
        {"fusion_dilations": (7, 1), "fusion_kernel_sizes": (3, 5)},
        {"fusion_kernel_sizes": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_any_fusion_computes_what_its_options_say(fusion: dict[str, Any]) -> None:
    model = micro_classifier(**fusion).eval()
    for name, parameter in model.named_parameters():
        if "state_fusion" in name:
            parameter.uniform_(-1, 1)
    inputs = []
    hook = model.layers[0].blocks[0].self_attention.in_proj.register_forward_hook(lambda *a: inputs.append(a[2]))
    with RecordMixers() as record:
        logits = model(images())
    hook.remove()
    tokens, _ = inputs[0].chunk(2, dim=-1)
    assert_near(record.outputs[0], fused_by_hand(model, tokens), 1e-5)
    with use_backend("torch"):
        assert_near(model(images()), logits, 1e-5)
    assert_near(model.fuse()(images()), logits, 1e-5)


def test_the_order_of_dilations_is_of_no_account() -> None:
    names = list(micro_classifier().state_dict())
    assert list(micro_classifier(fusion_dilations=(5, 1, 3), fusion_kernel_sizes=(3, 3, 3)).state_dict()) == names
    assert not any("state_fusion" in name for name in micro_classifier(fusion_dilations=()).state_dict())


def test_weights_of_another_fusion_are_refused() -> None:
    state = micro_classifier(fusion_dilations=(1, 3, 7)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"^state_dict: holds another model, .* 3x3 dilation 7; 5 classes\), than .*$"
    ):
        micro_classifier(fusion_dilations=(1, 3, 6)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"^state_dict: its classifier has 5 classes, the model has 6; .*$"):
        micro_classifier(fusion_dilations=(1, 3, 7), num_classes=6).load_state_dict(state)
    del state["layers.0.blocks.0.ln_1.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"layers\.0\.blocks\.0\.ln_1\.bias"'):
        micro_classifier(fusion_dilations=(1, 3, 7)).load_state_dict(state)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"fusion_dilations": (1, 0)}, r"fusion_dilations must be positive .* \(1, 0\)"),
        ({"fusion_dilations": (1.5,)}, r"fusion_dilations must be positive .* \(1.5,\)"),
        ({"fusion_dilations": (1, 3, 1)}, "name the same kernel twice"),
        ({"fusion_kernel_sizes": 4}, "fusion_kernel_sizes must be odd .* 4"),
        ({"fusion_kernel_sizes": (3, 3)}, r"one per dilation of \(1, 3, 5\), got \(3, 3\)"),
    ],
)
def test_impossible_fusions_are_refused(fusion: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_classifier(**fusion)


# --- nothing stale: what eval mode computes follows every change of the weights

Change = Callable[[SpatialMamba, Tensor], nn.Module]


def perturb_fusion(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".state_fusion." in name:
                parameter.mul_(1.5).add_(0.1)


def optimiser_step(model: SpatialMamba, x: Tensor) -> SpatialMamba:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model.train(), x)
    optimiser.step()
    return model


def ema_update(model: SpatialMamba, x: Tensor) -> nn.Module:
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        ema.module(x)
    optimiser_step(model, x)
    ema.update(model)
    return ema.module


def state_dict_load(model: SpatialMamba, x: Tensor) -> SpatialMamba:
    other = filled_classifier()
    perturb_fusion(other)
    model.load_state_dict(other.state_dict())
    return model


def in_place_change(model: SpatialMamba, x: Tensor) -> SpatialMamba:
    perturb_fusion(model)
    return model


def change_of_a_copy(model: SpatialMamba, x: Tensor) -> SpatialMamba:
    copied = deepcopy(model)
    perturb_fusion(copied)
    return copied


def change_in_float64(model: SpatialMamba, x: Tensor) -> SpatialMamba:
    model.to(torch.float64)
    perturb_fusion(model)
    with torch.no_grad():
        model.eval()(x.double())
    return model.to(torch.float32)


@pytest.mark.parametrize(
    "change", [optimiser_step, ema_update, state_dict_load, in_place_change, change_of_a_copy, change_in_float64]
)
def test_eval_mode_follows_every_change_of_the_weights(change: Change) -> None:
    x = images(2, 3, 48, 48)
    model = filled_classifier().eval()
    with torch.no_grad():
        before = model(x)  # whatever could be cached is cached now
    model = change(model, x)

    fresh = micro_classifier().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        evaluated, expected = model.eval()(x), fresh(x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_near(evaluated, expected, 1e-6)
    assert_near(model(x).detach(), expected, 1e-6)
    assert (evaluated - before).abs().max() > 1e-3 * before.abs().max()


def test_a_deep_copy_does_not_share_weights() -> None:
    model = filled_classifier().eval()
    with torch.no_grad():
        before = model(images())
        copied = deepcopy(model)
        perturb_fusion(model)
        assert_near(copied(images()), before, 1e-6)


# --- initialisation


@pytest.fixture(scope="module")
def initial() -> SpatialMamba:
    torch.manual_seed(0)
    return SpatialMamba(dims=32, depths=(1, 1, 2), num_classes=100)


def mixers(model: SpatialMamba) -> Iterator[nn.Module]:
    for stage in model.layers:
        for block in stage.blocks:
            yield block.self_attention


def assert_uniform(tensor: Tensor, bound: float) -> None:
    """Reaches to the bound and not beyond, with the spread of a uniform distribution."""
    assert tensor.abs().max().item() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_initial_scan_parameters(initial: SpatialMamba) -> None:
    for mixer in mixers(initial):
        width, rank = mixer.inner_dim, mixer.dt_rank
        assert rank == math.ceil(width / 32)  # of the block's width, half the inner one
        assert (mixer.A_logs == 0).all()
        assert (mixer.Ds == 1).all()
        assert_uniform(mixer.x_proj_weight, width**-0.5)
        assert_uniform(mixer.dt_projs_weight, rank**-0.5)
        step = F.softplus(mixer.dt_projs_bias.double())
        assert step.min() >= 1e-3 * (1 - 1e-4)
        assert step.max() <= 1e-1 * (1 + 1e-4)
        assert step.log10().mean().item() == pytest.approx(-2, abs=0.25)  # log-uniform, not uniform
    ranks = [mixer.dt_rank for mixer in mixers(initial)]
    assert ranks == [2, 4, 8, 8]


def test_initial_fusion_is_a_sum(initial: SpatialMamba) -> None:
    parameters = [p for mixer in mixers(initial) for p in mixer.state_fusion.parameters()]
    assert len(parameters) == 4 * 4
    assert all((p == 1).all() for p in parameters)


def test_initial_layers(initial: SpatialMamba) -> None:
    linears = [m for m in initial.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in initial.modules() if isinstance(m, nn.Conv2d)]
    assert len(linears) == 4 * 4 + 1
    assert len(convolutions) == 5 + 2 * 3 + 4 * 3
    for linear in linears:
        assert linear.weight.mean().item() == pytest.approx(0, abs=2e-3)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias is None or (linear.bias == 0).all()
    for convolution in convolutions:
        assert_uniform(convolution.weight, convolution.weight[0].numel() ** -0.5)


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    model = micro_classifier(depths=(2, 1, 3, 1), drop_path_rate=0.3)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [block.residual_sum.drop_prob for block in blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, 7).tolist())


# --- what others put around the modules or into them


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """FSDP2 of the modules whose names end so, and of the model."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for name, module in model.named_modules():
        if name.endswith(tuple(units)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_as_before(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """FSDP1 likewise."""
    chosen = [module for name, module in model.named_modules() if name.endswith(tuple(units))]
    policy = lambda module, recurse, **_: recurse or module in chosen  # noqa: E731
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on CPUs came with PyTorch 2.7")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [pytest.param(shard, marks=fsdp2), shard_as_before])
@pytest.mark.parametrize("units", [["blocks.0"], ["conv2d", "state_fusion", "out_norm", "in_proj", "cpe1", "norm"]])
def test_fsdp_of_any_unit(wrap: Callable[..., nn.Module], units: Sequence[str], process_group: None) -> None:
    def losses(model: nn.Module) -> list[float]:
        """Of two steps, the second with what the first has changed."""
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        values = []
        for _ in range(2):
            loss = F.cross_entropy(model(images(2, 3, 32, 32)), torch.arange(2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    model = micro_classifier(depths=(1, 1), drop_path_rate=0.0)
    expected = losses(deepcopy(model))
    assert losses(wrap(model, units)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_hooks_are_called_on_every_module(dtype: torch.dtype) -> None:
    model = filled_classifier(depths=(1, 1)).to(dtype)
    x = images(2, 3, 64, 48).to(dtype)
    expected = model(x)
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.add(module))
    assert_near(model(x), expected, 1e-10 if dtype == torch.float64 else 2e-2)
    assert called == {module for module in model.modules() if not isinstance(module, nn.ModuleList)}
    assert model.to("meta")(x.to("meta")).shape == expected.shape  # which knows no autocast


@pytest.mark.parametrize("name", ["conv2d", "state_fusion", "out_norm"])
def test_what_replaces_forward_is_called(name: str) -> None:
    """By tools that set a module's ``forward``, and by hooks of all modules."""
    model = filled_classifier(depths=(1,))
    expected = model(images())
    module = model.layers[0].blocks[0].self_attention.get_submodule(name)
    kind, forward = type(module), module.forward

    hook = register_module_forward_hook(lambda module, args, output: 2 * output if type(module) is kind else None)
    hooked = model(images())
    hook.remove()
    assert not torch.allclose(hooked, expected)
    module.forward = lambda *args: 2 * forward(*args)
    assert not torch.allclose(model(images()), expected)
    with pytest.raises(RuntimeError, match=f"self_attention.{name} has hooks or is wrapped"):
        model.eval().fuse()


def test_pruning_and_parametrised_weights_take_part() -> None:
    """The former changes weights in a hook, the latter wherever they are read."""
    for change in (partial(prune.random_unstructured, name="weight", amount=0.5), weight_norm):
        model = filled_classifier(depths=(1,)).double()
        mixer = model.layers[0].blocks[0].self_attention
        change(mixer.conv2d)
        before = model(images().double())
        with torch.no_grad():
            for parameter in mixer.conv2d.parameters():
                parameter.add_(torch.randn_like(parameter))
        after = model(images().double())
        after.sum().backward()
        assert not torch.allclose(before, after)
        assert all(parameter.grad.abs().max() > 0 for parameter in mixer.conv2d.parameters())


@pytest.mark.parametrize("use", [SpatialMamba.fuse, export_form])
def test_weights_are_not_read_past_a_wrapper(use: Callable[[nn.Module], nn.Module]) -> None:
    """As of LoRA, whose layers hold the weights that they were put around."""

    class LowRank(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.weight = linear, linear.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base_layer(x)

    for name in ("self_attention.in_proj", "mlp.fc2"):
        model = filled_classifier(depths=(1,)).eval()
        block = model.layers[0].blocks[0]
        expected = model(images())
        block.set_submodule(name, LowRank(block.get_submodule(name)))
        assert not torch.allclose(model(images()), expected)
        with pytest.raises(RuntimeError, match=rf"layers.0.blocks.0.{name} has hooks or is wrapped \(LowRank\)"):
            use(model)


# --- images that are none


WRONG_IMAGES = {
    "no batch": (torch.zeros(3, 32, 32), ValueError, r"\(B, 3, H, W\), got \(3, 32, 32\): .* with images\[None\]"),
    "channels last": (torch.zeros(1, 32, 40, 3), ValueError, r"got \(1, 32, 40, 3\): .* images\.permute\(0, 3, 1, 2\)"),
    "one channel": (torch.zeros(1, 1, 32, 32), ValueError, r"got \(1, 1, 32, 32\): .* make the model with in_chans=1"),
    "five axes": (torch.zeros(1, 1, 3, 32, 32), ValueError, "give one batch of images at a time"),
    "float64": (
        torch.zeros(1, 3, 32, 32, dtype=torch.float64),
        TypeError,
        r"are torch\.float64, but the weights are torch\.float32: call images\.to\(torch\.float32\) or model\.to\(",
    ),
    "array": (np.zeros((1, 3, 32, 32), np.float32), TypeError, "must be a tensor, got ndarray"),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"are torch\.uint8, .* images\.to\(.* / 255"),
}


@pytest.mark.parametrize(("images", "kind", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_images_that_are_none_get_one_clear_error(images: Any, kind: type[Exception], message: str) -> None:
    options = dict(dims=8, depths=(1,))
    models = [SpatialMamba(**options).eval(), SpatialMambaBackbone(out_indices=(0,), **options).eval()]
    models += [SpatialMamba(**options).eval().fuse(), create_feature_extractor(models[0], ["norm"])]
    for model in models:
        with pytest.raises(kind, match=f"images .*{message}"):
            model(images)
    if isinstance(images, Tensor):
        with pytest.raises(kind, match=f"images .*{message}"):
            models[0].to("meta")(images.to("meta"))


def test_autocast_takes_images_of_every_dtype_but_float64() -> None:
    image = torch.randn(1, 3, 32, 32)
    for weights in (torch.float32, torch.bfloat16):
        model = SpatialMamba(dims=8, depths=(1,)).to(weights)
        with torch.autocast("cpu", torch.bfloat16):
            for images in (torch.float32, torch.bfloat16, torch.float16):
                assert model(image.to(images)).dtype == torch.bfloat16
            with pytest.raises(TypeError, match=r"images are torch\.float64, but the weights are"):
                model(image.double())


# --- a backbone that starts from a classification checkpoint


def published_extras() -> dict[str, Any]:
    """What a released checkpoint stores beside its weights."""
    from yacs.config import CfgNode

    config = CfgNode({"MODEL": {"TYPE": "spatial_mamba"}})
    return dict(
        model_ema={}, optimizer={}, epoch=299, max_accuracy=np.float64(83.5), max_accuray_ema=0.0, config=config
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": state} | published_extras(),
        lambda state: state,
    ],
    ids=["model", "state_dict", "distributed", "published", "bare"],
)
def test_pretrained_backbone(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    state = filled_classifier().state_dict()
    torch.save(wrap(state), tmp_path / "classifier.pth")
    loaded = micro_backbone(pretrained=tmp_path / "classifier.pth").state_dict()
    expected = micro_backbone().state_dict()  # its outnorm layers
    expected |= {name: value for name, value in state.items() if name in expected}
    assert sum(name in state for name in expected) == len(state) - 4  # all but the classifier's norm and head
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_pretrained_backbone_that_ends_early(tmp_path: Path) -> None:
    state = filled_classifier().state_dict()
    torch.save({"model": state}, tmp_path / "classifier.pth")
    loaded = micro_backbone(out_indices=(0, 1), pretrained=tmp_path / "classifier.pth").state_dict()
    assert len(loaded) > 50
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if not name.startswith("outnorm"))
    with pytest.raises(WeightsError, match=r"another model.*depths=\(1, 1, 1, 1\)"):
        micro_backbone(depths=(1, 1), out_indices=(0, 1), pretrained=tmp_path / "classifier.pth")


def test_pretrained_backbone_leaves_out_unused_outnorms(tmp_path: Path) -> None:
    torch.save({"model": filled_classifier().state_dict()}, tmp_path / "classifier.pth")
    backbone = micro_backbone(out_indices=(3,), pretrained=str(tmp_path / "classifier.pth"))
    assert torch.equal(backbone.patch_embed.conv1.conv.weight, filled_classifier().patch_embed.conv1.conv.weight)


class LeavesATrace:
    """Unpickled carelessly, it runs a function of its writer's choice: here one that makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


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
        pytest.param(
            lambda path: torch.save({"model": micro_classifier(dims=16).state_dict()}, path),
            r"holds another model, custom \(dims 16, .* than the one that is to take it, custom \(dims 8,",
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
    assert trace.exists()  # so the file was dangerous indeed
