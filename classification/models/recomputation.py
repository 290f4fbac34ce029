"""Intermediate results that are computed again for the backward pass rather than stored."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ...kernels.backends import plain_eager


def recomputed(value: Tensor, module: nn.Module, argument: Tensor) -> AbstractContextManager[Any]:
    """Within this context, operations do not store ``value`` for their backward pass, but how to compute it.

    The backward pass then computes ``value = module(argument)`` again, so the module must be cheap and deterministic,
    and ``argument`` must not be modified in place. Other tensors are stored as usual. Has no effect if the module has
    forward hooks, and where `_stores` says so.
    """
    if _stores(value) or type(argument) is not Tensor or _has_forward_hooks(module):
        return nullcontext()
    return _Recomputed(value, module, argument)


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, without storing the results between its operations; it must be cheap and have no side effects.

    The backward pass calls it again, except where `_stores` says so.
    """
    return function(x) if _stores(x) else checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def _stores(x: Tensor) -> bool:
    """Whether results are stored: where there are no gradients; under compilers, which decide themselves what to
    recompute; and within hooks for saved tensors, such as those of activation checkpointing.
    """
    return not torch.is_grad_enabled() or not plain_eager(x) or _within_other_hooks()


class _Recomputed(saved_tensors_hooks):
    def __init__(self, value: Tensor, module: nn.Module, argument: Tensor) -> None:
        place = value.data_ptr()  # identifies the value and views of it, and does not keep it alive

        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if saved.data_ptr() == place and saved.is_contiguous() else saved

        def unpack(stored: Tensor | torch.Size) -> Tensor:
            return module(argument).view(stored) if isinstance(stored, torch.Size) else stored

        pack.recomputes = True  # type: ignore[attr-defined]
        super().__init__(pack, unpack)


def _has_forward_hooks(module: nn.Module) -> bool:
    every = nn.modules.module
    return any(
        (module._forward_hooks, module._forward_pre_hooks, every._global_forward_hooks, every._global_forward_pre_hooks)
    )


def _within_other_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in PyTorch 2.6
    hooks = top(False) if top else None
    return top is None or (hooks is not None and not hasattr(hooks[0], "recomputes"))
