"""Intermediate results that are computed again for the backward pass rather than stored."""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ...kernels.backends import plain_eager


def recomputed(value: Tensor, module: nn.Module, argument: Tensor) -> AbstractContextManager[Any]:
    """Within this context, operations do not store ``value`` for their backward pass, but how to compute it.

    The backward pass then computes ``value = module(argument)`` again, so the module must be cheap and deterministic.
    Other tensors are stored as usual. As ever, the backward pass raises RuntimeError if a tensor that it needs has been
    modified in place. Has no effect if the module has forward hooks, and where `_stores` says so.
    """
    if _stores(value, argument) or _has_forward_hooks(module) or _identity(value) is None:
        return nullcontext()
    return _Recomputed(value, module, argument)


def checkpointed(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """``second(first(x))``, without storing the result in between.

    The modules must be cheap and deterministic: the backward pass calls them again. The result is stored if they have
    forward hooks, and where `_stores` says so.
    """
    if _stores(x) or _has_forward_hooks(first) or _has_forward_hooks(second):
        return second(first(x))
    version, call_first, call_second = x._version, _with_present_weights(first), _with_present_weights(second)

    def compute(x: Tensor) -> Tensor:
        return call_second(call_first(_unmodified(x, version)))

    return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)


def _stores(*tensors: Tensor) -> bool:
    """Whether results are stored: where there are no gradients, as in inference mode; under compilers, which decide
    themselves what to recompute; and within hooks for saved tensors, such as those of activation checkpointing.
    """
    if not torch.is_grad_enabled() or not plain_eager(*tensors) or _within_other_hooks():
        return True
    return any(x.is_inference() for x in tensors)


# A tensor and its version; if it is the argument of the module, also the shape of the value. Named here, because
# annotations of inner functions are evaluated in each call (before Python 3.14).
_Stored = tuple[Tensor, int, torch.Size | None]


class _Recomputed(saved_tensors_hooks):
    def __init__(self, value: Tensor, module: nn.Module, argument: Tensor) -> None:
        self.value = value  # kept alive within the context, else another tensor could get its address
        identity, version, compute = _identity(value), argument._version, _with_present_weights(module)
        numel = value.numel()  # compared first, because it differs for most tensors

        def pack(saved: Tensor) -> _Stored:
            if saved.numel() == numel and _identity(saved) == identity:
                return argument, version, saved.shape
            return saved, saved._version, None

        def unpack(stored: _Stored) -> Tensor:
            tensor, version, shape = stored
            tensor = _unmodified(tensor, version)
            return tensor if shape is None else compute(tensor).view(shape)

        pack.recomputes = True  # type: ignore[attr-defined]
        super().__init__(pack, unpack)


def _unmodified(tensor: Tensor, version: int) -> Tensor:
    """The tensor, if it still has this version. PyTorch checks that itself only for tensors saved without hooks."""
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified in place after the "
            "forward pass: modify a clone, or call backward() first"
        )
    return tensor


def _identity(x: Tensor) -> tuple[Any, ...] | None:
    """Distinguishes a tensor from all others and from itself once modified, but not from views of the same elements.

    None if it is not contiguous or has no memory, like tensors on the meta device.
    """
    if type(x) is not Tensor or not torch._C._has_storage(x) or not x.is_contiguous() or not x.data_ptr():
        return None
    return x.data_ptr(), x.numel(), x.dtype, x._version


def _with_present_weights(module: nn.Module) -> Callable[..., Tensor]:
    """The module with the weights it has now, since ``torch.func.functional_call`` replaces them only temporarily."""
    weights = _weights(module)
    versions = [weight._version for weight in weights.values()]

    def call(*arguments: Any) -> Tensor:
        present = list(map(_unmodified, weights.values(), versions))
        if all(map(operator.is_, _weights(module).values(), present)):
            return module(*arguments)
        return functional_call(module, weights, arguments)

    return call


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by name. ``named_parameters`` takes 10 us even for a module without parts."""
    if module._modules:
        return dict(module.named_parameters())
    return {name: weight for name, weight in module._parameters.items() if weight is not None}


def _has_forward_hooks(module: nn.Module) -> bool:
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _within_other_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in PyTorch 2.6
    hooks = top(False) if top else None
    return top is None or (hooks is not None and not hasattr(hooks[0], "recomputes"))
