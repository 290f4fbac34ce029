"""Registers an operator with PyTorch: the backend that runs it, shapes, gradients of any order, and FLOPs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import backends
from .tensors import without_autocast

_AUTOGRAD_KEYS = [getattr(torch._C.DispatchKey, f"Autograd{name}") for name in ("CPU", "CUDA", "MPS", "XPU", "Other")]


@dataclass
class Operator:
    """An operator ``spatial_mamba::NAME``. Its tensors come first; the first of them decides on the backend.

    A call runs the reference implementation as it is, which PyTorch differentiates, or one operator of PyTorch's.

    Args:
        schema: ``"NAME(ARGUMENTS) -> OUTPUTS"``.
        reference: the reference implementation, from the arguments to the outputs.
        forward: the same on a native backend, which comes in front of the arguments.
        fake: from the arguments to empty outputs.
        backward: from a backend, the gradients of the outputs, the tensors, the kept outputs and the other arguments
            to the gradients of the tensors. Without it the operator has no gradients.
        kept: number of last outputs that are for the backward pass alone; calls leave them out.
        served_as: the operator whose backend serves this one; default itself.
        flops: from the shapes of the arguments to a number.
    """

    schema: str
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    kept: int = 0
    served_as: str | None = None
    flops: Callable[..., int] | None = None

    def __post_init__(self) -> None:
        self.name, _, signature = self.schema.partition("(")
        inputs, _, returns = signature.partition(") -> ")
        inputs = inputs.split(", ")
        self.served_as = self.served_as or self.name
        self.tensors = sum(argument.startswith("Tensor") for argument in inputs)
        self.differentiable = returns.count("Tensor") - self.kept

        name = f"spatial_mamba::{self.name}"
        operator = custom_op(name, self.run, mutates_args=(), schema=f"({signature}")
        operator.register_fake(self.fake)
        if self.backward is not None:
            grads = [f"Tensor grad{i}" for i in range(self.differentiable)]
            kept = [f"Tensor kept{i}" for i in range(self.kept)]
            signature = ", ".join([*grads, *inputs[: self.tensors], *kept, *inputs[self.tensors :]])
            schema = f"({signature}) -> ({', '.join(['Tensor'] * self.tensors)})"
            gradients = custom_op(f"{name}_backward", self.run_backward, mutates_args=(), schema=schema)
            gradients.register_fake(self._fake_backward)
            operator.register_autograd(self._differentiate, setup_context=self._save)
        self.operator = getattr(torch.ops.spatial_mamba, self.name)
        if self.flops is not None:
            register_flop_formula(self.operator)(self.flops)

    def __call__(self, *arguments: Any) -> Any:
        with without_autocast(arguments[0]):
            plain = backends.reference_serves(arguments[0], self.served_as)
            outputs = _as_tuple((self.reference if plain else self.operator)(*arguments))
        return outputs[0] if self.differentiable == 1 else outputs[: self.differentiable]

    def run(self, *arguments: Any) -> Any:
        """The outputs, from the backend that serves the first tensor; not differentiable."""
        with without_autocast(arguments[0]):
            if backend := backends.module_for(arguments[0], self.served_as):
                return self.forward(backend, *arguments)
            outputs = self.reference(*arguments)
        if isinstance(outputs, Tensor):
            return outputs.contiguous()
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in outputs)  # they may not share memory

    def run_backward(self, *arguments: Any, **into: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the tensors, empty for None; native backends write into tensors that ``backward`` takes."""
        first = arguments[self.differentiable]
        with without_autocast(first):
            if backend := backends.module_for(first, self.served_as):
                return tuple(self.backward(backend, *arguments, **into))
            return self._reference_gradients(*arguments, create_graph=False)

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = arguments[self.differentiable :][: self.tensors]
        return tuple(tensors[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = _as_tuple(output)[self.differentiable :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(self.differentiable > 1)  # no zeros for kept outputs
        ctx.save_for_backward(*inputs[: self.tensors], *kept)
        ctx.others = inputs[self.tensors :]

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * (self.tensors + len(ctx.others))
        saved = ctx.saved_tensors  # to be read only once, for activation checkpointing
        arguments = (*(grad.contiguous() for grad in grads[: self.differentiable]), *saved, *ctx.others)
        if torch.is_grad_enabled():
            found = self._reference_gradients(*arguments, create_graph=True)
        else:
            found = getattr(torch.ops.spatial_mamba, f"{self.name}_backward")(*arguments)
        found = (None if x is None else grad for x, grad in zip(saved[: self.tensors], found, strict=True))
        return *found, *(None for _ in ctx.others)

    def _reference_gradients(self, *arguments: Any, create_graph: bool) -> tuple[Tensor, ...]:
        grads, inputs = arguments[: self.differentiable], arguments[self.differentiable :]
        tensors, others = inputs[: self.tensors], inputs[self.tensors + self.kept :]
        with torch.enable_grad(), _recorded():
            if not create_graph:
                tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
            outputs = _as_tuple(self.reference(*tensors, *others))[: self.differentiable]
            leaves = [x for x in tensors if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=create_graph, materialize_grads=True))
        wanted = [x is not None and x.requires_grad for x in tensors]
        return tuple(next(found).contiguous() if is_wanted else grads[0].new_empty(0) for is_wanted in wanted)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def _recorded() -> Iterator[None]:
    """Let autograd record, also inside an operator, below which PyTorch excludes it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield
