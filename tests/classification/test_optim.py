"""Optimiser, schedule, losses and precision of the recipe."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_mamba.classification import engine, optim
from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import build_mixup
from spatial_mamba.classification.optim import autocast_dtype, build_criterion, build_optimizer, build_scheduler
from spatial_mamba.classification.trainer import build_model


def test_optimizer_and_schedule_of_the_recipe() -> None:
    config, _ = load_config("spatialmamba_digits", [("TRAIN.WARMUP_EPOCHS", 2), ("TRAIN.EPOCHS", 10)])
    config.defrost()
    config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR, config.TRAIN.MIN_LR = 5e-4, 5e-7, 5e-6
    config.DATA.BATCH_SIZE = 128
    model = build_model(config, 10)
    optimizer = build_optimizer(config, model, world_size=8)  # 1024 images: twice the base rates
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(".bias")
        assert decays[id(parameter)] == (0.0 if spared else 0.05), name
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in optimizer.param_groups)

    scheduler = build_scheduler(config, optimizer, updates_per_epoch=10, world_size=8)
    rates = []
    for update in range(100):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[10] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[20] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way through the cosine
    scheduler.step_update(100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_losses_and_targets_follow_the_recipe(micro: Path) -> None:
    config, _ = load_config(micro)
    mixup = build_mixup(config, num_classes=3)
    np.random.seed(0)
    _, targets = mixup(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert targets.min() >= 0.1 / 3 - 1e-6, "labels are smoothed"
    assert type(build_criterion(config)).__name__ == "SoftTargetCrossEntropy"
    plain, _ = load_config(micro, [("AUG.MIXUP", 0), ("AUG.CUTMIX", 0)])
    assert build_mixup(plain, 3) is None
    assert type(build_criterion(plain)).__name__ == "LabelSmoothingCrossEntropy"

    logits, images = torch.randn(4, 3), torch.randn(4, 3)
    loss = engine._self_distillation(logits, images, torch.nn.Identity(), torch.float32)
    expected = -(images.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # Ten epochs of ten updates, two of them warm-up, rates from 0 to 1.
        ("linear", {0: 0.0, 10: 0.5, 20: 1.0, 60: 1 - 0.99 / 2, 99: 1 - 0.99 * 79 / 80}),
        ("multistep", {10: 0.5, 20: 1.0, 39: 1.0, 40: 0.2, 69: 0.2, 70: 0.04, 99: 0.04}),
        ("step", {10: 0.5, 20: 1.0, 29: 1.0, 30: 0.3, 59: 0.3, 60: 0.09}),
    ],
)
def test_other_schedules_are_the_published_ones(name: str, rates: dict[int, float]) -> None:
    """The formulas of Swin Transformer's schedules, which the published trainer uses."""
    schedule = {"NAME": name, "GAMMA": 0.2, "MULTISTEPS": [4, 7], "DECAY_EPOCHS": 3, "DECAY_RATE": 0.3}
    settings = [(f"TRAIN.LR_SCHEDULER.{key}", value) for key, value in schedule.items()]
    settings += [("TRAIN.EPOCHS", 10), ("TRAIN.WARMUP_EPOCHS", 2), ("TRAIN.SCALE_LR", False)]
    settings += [("TRAIN.BASE_LR", 1.0), ("TRAIN.WARMUP_LR", 0.0), ("TRAIN.MIN_LR", 0.0)]
    config, _ = load_config("spatialmamba_tiny", settings)
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), 1)
    scheduler = build_scheduler(config, optimizer, updates_per_epoch=10, world_size=1)
    found = {}
    for update in range(100):
        scheduler.step_update(update)
        found[update] = optimizer.param_groups[0]["lr"]
    assert {update: found[update] for update in rates} == pytest.approx(rates)


def test_precision_follows_device_and_config(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    on, _ = load_config(micro, [("AMP_ENABLE", True)])
    off, _ = load_config(micro)
    forced, _ = load_config(micro, [("AMP_ENABLE", True), ("AMP_DTYPE", "float16")])
    for has_bfloat16, on_gpu in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert autocast_dtype(on, cuda) == on_gpu
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for processor, takes_bfloat16, features, on_cpu in (
        ("only AVX2", False, "avx2", torch.float32),
        ("AVX-512 without bfloat16", True, "avx2 avx512f", torch.float32),
        ("AVX-512 with bfloat16", True, "avx2 avx512f avx512_bf16", torch.bfloat16),
        ("Arm without bfloat16", False, "asimd", torch.float32),
        ("Arm with bfloat16", True, "asimd bf16", torch.bfloat16),
        ("unknown to this system", True, "", torch.bfloat16),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda takes=takes_bfloat16: takes)
        monkeypatch.setattr(optim, "cpu_features", lambda features=features: set(features.split()))
        assert autocast_dtype(on, cpu) == on_cpu, processor
    assert autocast_dtype(forced, cuda) == torch.float16
    assert autocast_dtype(off, cuda) == torch.float32


def test_the_fused_optimiser_updates_as_the_plain_one_does() -> None:
    config, _ = load_config("spatialmamba_digits")
    torch.manual_seed(0)
    models = [build_model(config, 10) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(config, model, world_size=1) for model in models]
    assert all(group["fused"] for group in optimizers[0].param_groups)
    for group in optimizers[1].param_groups:
        group["fused"], group["foreach"] = False, False
    images = torch.randn(2, 3, 32, 32)
    models[0](images).square().sum().backward()  # gradients in the memory layout that the model gives them
    for _ in range(3):
        for p, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    groups = optimizers[0].state_dict()["param_groups"]
    optimizers[0].load_state_dict({"state": optimizers[1].state_dict()["state"], "param_groups": groups})  # as resumed
    for optimizer in optimizers:
        optimizer.step()
    for (name, p), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_other_optimisers_are_built_as_they_can_be(name: str) -> None:
    config, _ = load_config("spatialmamba_digits", [("TRAIN.OPTIMIZER.NAME", name)])
    model = build_model(config, 10)
    optimizer = build_optimizer(config, model, world_size=1)
    assert optimizer.param_groups[0].get("fused", False) is (name == "sgd")
