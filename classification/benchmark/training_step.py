"""The trainer's step on images and targets that stay the same: what memory and scaling are measured on."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..config import uses_mixup
from ..optim import autocast_dtype, build_criterion, build_optimizer
from ..trainer import build_model


def class_count(config: CfgNode) -> int:
    """The config's number of classes, or ImageNet-1K's where it leaves that to the data set."""
    return config.MODEL.NUM_CLASSES or 1000


class TrainingStep:
    """A call is one step: forward pass, loss, backward pass, clipping, update; without EMA.

    Args:
        config: the trainer's.
        batch: random images per step.
        size: their side in pixels.
        device: where the step runs.
        wrap: what becomes of the model before it runs, such as ``torch.compile``.

    Raises:
        InputError: if the config describes no model or optimiser that can be built.
    """

    def __init__(
        self,
        config: CfgNode,
        batch: int,
        size: int,
        device: torch.device,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        classes = class_count(config)
        self.device, self.dtype = device, autocast_dtype(config, device)
        self.model = build_model(config, classes).to(device).train()
        self.wrapped = wrap(self.model)
        self.optimizer = build_optimizer(config, self.model, world_size=1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.criterion, self.limit = build_criterion(config), config.TRAIN.CLIP_GRAD or float("inf")
        self.images = torch.randn(batch, self.model.in_chans, size, size, device=device)
        self.targets = torch.randint(classes, (batch,), device=device)
        if uses_mixup(config):
            self.targets = nn.functional.one_hot(self.targets, classes).float()

    def __call__(self) -> None:
        self._backward(self.wrapped)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def unsynchronised(self) -> None:
        """The same, but a data-parallel process goes by its own gradients."""
        with self.wrapped.no_sync():
            self()

    def unlike_strides(self) -> list[str]:
        """Parameters whose gradients come in other strides than their own."""
        self._backward(self.model)
        names = [name for name, p in self.model.named_parameters() if p.grad.stride() != p.stride()]
        self.optimizer.zero_grad()
        return names

    def gradient_bytes(self) -> int:
        """What the processes of a data-parallel step tell each other."""
        return sum(p.numel() * p.itemsize for p in self.model.parameters() if p.requires_grad)

    def state_bytes(self) -> int:
        """What stays between steps: weights, buffers and optimiser state; gradients are freed."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def _backward(self, model: nn.Module) -> None:
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            logits = model(self.images)
        self.scaler.scale(self.criterion(logits.float(), self.targets)).backward()
