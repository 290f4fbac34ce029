"""Parts of the training recipe: augmentation of any strength, and the optimisers."""

import itertools

import pytest
import torch
from PIL import Image

pytest.importorskip("yacs")

from spatial_mamba.classification.config import load_config
from spatial_mamba.classification.data import build_transform
from spatial_mamba.classification.optim import build_optimizer
from spatial_mamba.classification.trainer import build_model


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original", "3a"])
def test_augmentation_of_any_strength_works(policy: str) -> None:
    config, _ = load_config("spatialmamba_tiny", [("AUG.AUTO_AUGMENT", policy)])
    step = next(
        step for step in build_transform(config, is_training=True).transforms if "ugment" in type(step).__name__
    )
    operations = [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]
    photo = Image.linear_gradient("L").convert("RGB")
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        assert operation(photo).size == photo.size
    for operation in operations:
        if operation.name == "PosterizeIncreasing" and operation.magnitude == 10:
            assert operation(photo).getextrema() == ((0, 0),) * 3  # it keeps no bits


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
    models[0](images).square().sum().backward()  # gradients as the model lays them out
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
