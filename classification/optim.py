"""Optimiser, learning-rate schedule, losses and precision of the recipe, built with timm."""

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from yacs.config import CfgNode

from ..kernels.build import cpu_features
from ..kernels.errors import UserError
from .config import images_per_update, uses_mixup

FUSED_OPTIMIZERS = ("adamw", "adam", "sgd", "nesterov", "momentum")  # PyTorch's, which update in one kernel


def learning_rate_scale(config: CfgNode, world_size: int) -> float:
    """Images per update over 512, the batch size that the configured rates are for; 1 without ``TRAIN.SCALE_LR``."""
    if not config.TRAIN.SCALE_LR:
        return 1.0
    return images_per_update(config, world_size) / 512


def build_optimizer(config: CfgNode, model: nn.Module, world_size: int) -> torch.optim.Optimizer:
    """Build the optimiser. 1-D parameters, names ending in ``.bias`` and the model's exceptions have no weight decay.

    PyTorch's optimisers run fused: one pass over a parameter and its state instead of one per operation.

    Raises:
        UserError: for an optimiser that timm does not know, that needs second derivatives, or another number of betas.
    """
    optimizer = config.TRAIN.OPTIMIZER
    name = optimizer.NAME.lower()
    arguments = dict(eps=optimizer.EPS, betas=tuple(optimizer.BETAS))
    if name in ("sgd", "nesterov", "momentum"):
        arguments = dict(momentum=optimizer.MOMENTUM)
    if name in FUSED_OPTIMIZERS:
        arguments["fused"] = True
    try:
        info = get_optimizer_info(name.removeprefix("lookahead_"))
        if info.second_order:
            raise ValueError("it needs second derivatives")
        if info.has_betas and len(optimizer.BETAS) != info.num_betas:
            raise ValueError(f"it takes {info.num_betas} numbers as TRAIN.OPTIMIZER.BETAS")
        return create_optimizer_v2(
            model,
            opt=name,
            lr=config.TRAIN.BASE_LR * learning_rate_scale(config, world_size),
            weight_decay=config.TRAIN.WEIGHT_DECAY,
            filter_bias_and_bn=True,
            **arguments,
        )
    except (ValueError, AssertionError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"TRAIN.OPTIMIZER.NAME is {optimizer.NAME!r}: it cannot be used ({error})") from error


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, updates_per_epoch: int, world_size: int
) -> Scheduler:
    """Build the schedule of warm-up and decay, in updates.

    ``linear`` falls to a hundredth after the warm-up. ``step`` and ``multistep`` count from the start of the warm-up.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    name, scale = schedule.NAME, learning_rate_scale(config, world_size)
    prefix = name == "linear" or (name == "cosine" and schedule.WARMUP_PREFIX)
    min_lr, decay_rate = train.MIN_LR * scale, schedule.DECAY_RATE
    milestones = schedule.MULTISTEPS
    if name == "linear":
        name, decay_rate, min_lr = "poly", 1.0, train.BASE_LR * scale / 100
    elif name == "multistep":
        # timm decays one update before a milestone; half an update more makes this robust to rounding.
        decay_rate, milestones = schedule.GAMMA, [epoch + 0.5 / updates_per_epoch for epoch in milestones]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=train.EPOCHS - (train.WARMUP_EPOCHS if prefix else 0),
        decay_epochs=schedule.DECAY_EPOCHS,
        decay_milestones=milestones,
        decay_rate=decay_rate,
        min_lr=min_lr,
        warmup_lr=train.WARMUP_LR * scale,
        warmup_epochs=train.WARMUP_EPOCHS,
        warmup_prefix=prefix,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def build_criterion(config: CfgNode) -> nn.Module:
    """Loss of logits (B, classes) against class numbers (B,), or against soft targets where images are mixed."""
    if uses_mixup(config):
        return SoftTargetCrossEntropy()
    if config.MODEL.LABEL_SMOOTHING > 0:
        return LabelSmoothingCrossEntropy(smoothing=config.MODEL.LABEL_SMOOTHING)
    return nn.CrossEntropyLoss()


def autocast_dtype(config: CfgNode, device: torch.device) -> torch.dtype:
    """Precision of the training step: float32 without AMP, else bfloat16 where the device supports it, else float16.

    A CPU without bfloat16 instructions trains in float32, because half precision would be slower.
    """
    if not config.AMP_ENABLE:
        return torch.float32
    if config.AMP_DTYPE != "auto":
        return getattr(torch, config.AMP_DTYPE)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    accepts_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # oneDNN accepts bfloat16 on all processors with AVX-512. On those without bfloat16 instructions it converts to
    # float32 and back, and a step takes twice as long.
    features = cpu_features()
    converts = "avx512f" in features and "avx512_bf16" not in features
    return torch.bfloat16 if accepts_bfloat16 and not converts else torch.float32
