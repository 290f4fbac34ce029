"""The models: golden values, sizes, precision, options of the fusion, weights that are never stale, wrong images."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from spatial_mamba import SpatialMamba, SpatialMambaBackbone, spatial_mamba_tiny
from spatial_mamba.kernels import selective_scan, state_fusion, use_backend

from .micro_models import (
    CONFIGS,
    GOLDEN,
    PARAMETERS,
    RecordMixers,
    assert_near,
    filled_classifier,
    golden_fill,
    half_types,
    images,
    micro_backbone,
    micro_classifier,
    needs_native_mixer,
    perturb_fusion,
    train_step,
)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_state_dicts_and_parameter_counts_are_the_published_ones(variant: str) -> None:
    expected = json.loads((GOLDEN / f"state_dict_{variant}.json").read_text())
    with torch.device("meta"):
        classifier = timm.create_model(f"spatial_mamba_{variant}")
        backbone = SpatialMambaBackbone(**CONFIGS[variant])
    for name, model in (("classifier", classifier), ("backbone", backbone)):
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected[name]
    assert sum(p.numel() for p in classifier.parameters()) == PARAMETERS[variant]


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "fused": lambda model: model.fuse(),
    "fused, moved to channels_last": lambda model: model.fuse().to(memory_format=torch.channels_last),
    "channels_last, fused": lambda model: model.to(memory_format=torch.channels_last).fuse(),
}


@pytest.mark.parametrize("form", FORMS)
def test_golden_logits_and_features(form: str, golden: dict[str, np.ndarray]) -> None:
    model = FORMS[form](golden_fill.fill_(spatial_mamba_tiny()).eval())
    backbone = FORMS[form](golden_fill.fill_(SpatialMambaBackbone()).eval())
    with torch.inference_mode():
        assert_near(model(golden_fill.image("a", (2, 3, 224, 224))), torch.tensor(golden["tiny_logits_224"]), 1e-4)
        maps = backbone(golden_fill.image("b", (1, 3, 128, 96)))
    assert len(maps) == 4
    for i, features in enumerate(maps):
        assert_near(features, torch.tensor(golden[f"tiny_feature{i}_128x96"]), 1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance", "zero"),
    [
        ("cpu", torch.float32, 1e-3, 1e-5),
        ("cpu", torch.float64, 1e-6, 1e-12),
        pytest.param("cuda", torch.float32, 5e-3, 1e-4, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_golden_training_step(
    golden: dict[str, np.ndarray], device: str, dtype: torch.dtype, tolerance: float, zero: float
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = golden_fill.fill_(spatial_mamba_tiny(drop_path_rate=0.0)).to(device, dtype).train()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = model(golden_fill.image("c", (4, 3, 64, 64)).to(device, dtype))
        loss = F.cross_entropy(logits, torch.arange(4, device=device) * 37 % 1000)
        loss.backward()

    assert loss.item() == pytest.approx(golden["tiny_train_64_loss"].item(), rel=tolerance)
    assert_near(logits.cpu(), torch.from_numpy(golden["tiny_train_64_logits"]), tolerance)

    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    names = golden["tiny_train_64_grad_names"].tolist()
    assert sorted(names) == sorted(gradients)
    norms, heads = golden["tiny_train_64_grad_norms"], golden["tiny_train_64_grad_head4"]
    failures = []
    for name, norm, head in zip(names, norms.tolist(), heads, strict=True):
        gradient = gradients[name]
        if norm < 1e-10:  # a bias before a BatchNorm, which subtracts the mean
            if gradient.norm() > zero:
                failures.append(f"{name}: norm {gradient.norm():.3g} instead of 0")
            continue
        first = gradient.flatten()[:4].numpy()
        norm_error = abs(gradient.norm().item() - norm) / norm
        head_error = np.abs(first - head[: len(first)]).max() / norm
        # The three gradients of an alpha are large sums that cancel. Their error in float32 depends on the processor:
        # 8e-4 with fused multiply-adds, 2e-3 without.
        allowed = 4 * tolerance if name.endswith(".alpha") else tolerance
        if max(norm_error, head_error) > allowed:
            failures.append(f"{name}: norm off by {norm_error:.3g}, first values by {head_error:.3g}")
    assert not failures


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


def test_one_out_index_and_an_empty_name_of_weights() -> None:
    assert micro_backbone(out_indices=2, pretrained="").out_indices == (2,)


def test_out_indices_select_from_the_same_maps() -> None:
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
        ({"dims": [8, 16]}, r"dims.* even number, got \[8, 16\]"),
        ({"depths": 2}, "depths .* got 2"),
        ({"depths": (1, 0)}, r"depths .* \(1, 0\)"),
        ({"depths": ()}, r"depths .* \(\)"),
        ({"drop_path_rate": 2}, "drop_path_rate must be .* got 2"),
    ],
)
def test_backbone_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_backbone(**change)


@needs_native_mixer
@half_types
def test_autocast_is_close_to_float32_and_keeps_scan_outputs_in_it(dtype: torch.dtype) -> None:
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
    # u, B and C fit into half precision; their product, which kernels of 1 multiply by 27, does not.
    model = micro_classifier().eval()
    for stage in model.layers:
        mixer = stage.blocks[0].self_attention
        with torch.no_grad():
            mixer.in_proj.weight[: mixer.inner_dim] *= 5e3
            mixer.x_proj_weight[: mixer.dt_rank] = 0  # all tokens have the initial delta
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


def fused_by_hand(model: SpatialMamba, x: Tensor) -> Tensor:
    """Scan, fusion and read-out of the first block, computed by separate operators from its tokens ``x``."""
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


def test_the_order_of_dilations_does_not_matter() -> None:
    names = list(micro_classifier().state_dict())
    assert list(micro_classifier(fusion_dilations=(5, 1, 3), fusion_kernel_sizes=(3, 3, 3)).state_dict()) == names
    assert not any("state_fusion" in name for name in micro_classifier(fusion_dilations=()).state_dict())


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"fusion_dilations": (1, 0)}, r"fusion_dilations must be integers .* \(1, 0\)"),
        ({"fusion_dilations": (1.5,)}, r"fusion_dilations must be integers .* \(1.5,\)"),
        ({"fusion_dilations": (1, 3, 1)}, "name the same kernel twice"),
        ({"fusion_kernel_sizes": 4}, "fusion_kernel_sizes must be odd .* 4"),
        ({"fusion_kernel_sizes": (3, 3)}, r"one per dilation of \(1, 3, 5\), got \(3, 3\)"),
    ],
)
def test_impossible_fusions_are_refused(fusion: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_classifier(**fusion)


Change = Callable[[SpatialMamba, Tensor], nn.Module]


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
        before = model(x)  # would fill any cache
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


WRONG_IMAGES = {
    "no batch": (torch.zeros(3, 32, 32), ValueError, r"\(B, 3, H, W\), got \(3, 32, 32\): .* with images\[None\]"),
    "channels last": (torch.zeros(1, 32, 40, 3), ValueError, r"got \(1, 32, 40, 3\): .* images\.permute\(0, 3, 1, 2\)"),
    "one channel": (torch.zeros(1, 1, 32, 32), ValueError, r"got \(1, 1, 32, 32\): .* build the model with in_chans=1"),
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
def test_wrong_images_get_one_clear_error(images: Any, kind: type[Exception], message: str) -> None:
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
