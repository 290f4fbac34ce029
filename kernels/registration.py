"""Register an operator with PyTorch: its backends, output shapes, gradients of any order, and FLOPs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from . import backends
from .tensors import without_autocast

_LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")
_AUTOGRAD_KEYS = [getattr(torch._C.DispatchKey, f"Autograd{name}") for name in ("CPU", "CUDA", "MPS", "XPU", "Other")]
# The dispatch keys below autograd of ordinary tensors. Fake tensors and batches of gradients, for example, have more.
_ORDINARY = {torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)}


@dataclass
class Operator:
    """The operator ``spatial_mamba::NAME``. Its first tensor selects the backend. Call it with positional arguments.

    Where a native backend serves, PyTorch sees one custom operator. Where the reference implementation serves, it runs
    as ordinary PyTorch code: PyTorch differentiates it and counts the FLOPs of the operations in it.

    Args:
        schema: ``"NAME(ARGUMENTS) -> OUTPUTS"``, without defaults; tensor arguments must precede all others.
        reference: ``reference(*arguments) -> outputs``, the reference implementation; also gives higher derivatives.
        fake: ``fake(*arguments) -> outputs``, empty tensors with the shapes and dtypes of the outputs.
        forward: ``forward(backend, *arguments) -> outputs``, with the module or namespace of a native backend. By
            default ``backend.NAME(*arguments)``.
        backward: ``backward(backend, *grads, *tensors, *kept, *others) -> gradients of the tensors``. By default
            ``backend.NAME_backward(...)``.
        differentiable: whether the custom operator has gradients.
        kept: number of trailing outputs that only the backward pass needs; calls do not return them.
        served_as: for an operator composed of others, the one whose backend serves it.
        flops: ``flops(*shapes) -> number``, from the shapes of the arguments, for PyTorch's FLOP counter.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    differentiable: bool = True
    kept: int = 0
    served_as: str | None = None
    flops: Callable[..., int] | None = None

    def __post_init__(self) -> None:
        self.name, _, signature = self.schema.partition("(")
        text, _, returns = signature.partition(") -> ")
        inputs = text.split(", ")
        self._served_as = self.served_as or self.name
        self._forward = self.forward or (lambda backend, *inputs: getattr(backend, self.name)(*inputs))
        self._backward = self.backward or (lambda backend, *inputs: getattr(backend, f"{self.name}_backward")(*inputs))
        self.num_tensors = sum(argument.startswith("Tensor") for argument in inputs)
        if any("Tensor" in argument for argument in inputs[self.num_tensors :]):
            raise ValueError(f"{self.schema}: tensor arguments must precede all others")
        self.num_differentiable = returns.count("Tensor") - self.kept

        self.operator = _define(self.name, signature, self.run, self.fake)
        # Not autograd.Function, which first looks for transforms of torch.func: they never get here.
        methods = {"forward": staticmethod(self._save), "backward": staticmethod(self._differentiate)}
        self._node: Any = type(self.name, (_SingleLevelFunction,), methods)
        _LIBRARY.impl(self.name, self._record, "Autograd", with_keyset=True)
        if self.differentiable:
            grads = [f"Tensor grad{i}" for i in range(self.num_differentiable)]
            kept = [f"Tensor kept{i}" for i in range(self.kept)]
            signature = ", ".join([*grads, *inputs[: self.num_tensors], *kept, *inputs[self.num_tensors :]])
            signature += f") -> ({', '.join(['Tensor'] * self.num_tensors)})"
            self._gradients = _define(f"{self.name}_backward", signature, self.run_backward, self._fake_backward)
        if flops := self.flops:
            register_flop_formula(self.operator.overloadpacket)(lambda *shapes, **_: flops(*shapes))

    def __call__(self, *arguments: Any) -> Any:
        if self._needs_no_dispatcher(arguments):
            outputs = _as_tuple(self._record(None, *arguments))
        elif backends.reference_serves(arguments[0], self._served_as):
            with without_autocast(arguments[0]):
                outputs = _as_tuple(self.reference(*arguments))
        else:
            outputs = _as_tuple(self.operator(*arguments))
        return outputs[0] if self.num_differentiable == 1 else outputs[: self.num_differentiable]

    def _needs_no_dispatcher(self, arguments: Sequence[Any]) -> bool:
        """Whether PyTorch's dispatcher would do nothing but call this class again; skipping it saves 20 us.

        Profilers see only the calls that go through it.
        """
        if torch.autograd.profiler._is_profiler_enabled:
            return False
        return backends.has_kernels(self._served_as, *[x for x in arguments if isinstance(x, Tensor)])

    def run(self, *arguments: Any) -> Any:
        """Compute the outputs on the backend that serves the first tensor; not differentiable."""
        with without_autocast(arguments[0]):
            if backend := backends.module_for(arguments[0], self._served_as):
                return self._forward(backend, *arguments)
            outputs = self.reference(*arguments)
        # Copied, because outputs of custom operators must not share memory with anything.
        copies = tuple(x.clone(memory_format=torch.contiguous_format) for x in _as_tuple(outputs))
        return copies if isinstance(outputs, tuple) else copies[0]

    def run_backward(self, *arguments: Any, **into: Tensor) -> tuple[Tensor, ...]:
        """Compute the gradients of the tensors, empty for absent ones. Native backends may write them to ``into``."""
        first = arguments[self.num_differentiable]
        with without_autocast(first):
            if backend := backends.module_for(first, self._served_as):
                return tuple(self._backward(backend, *arguments, **into))
            return self._reference_gradients(*arguments, create_graph=False)

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = arguments[self.num_differentiable :][: self.num_tensors]
        return tuple(tensors[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    def _record(self, keys: Any, *arguments: Any) -> Any:
        """The kernel for autograd: add a node to the graph if a tensor needs gradients.

        ``keys`` are the dispatch keys, None for a call that bypasses the dispatcher.
        """
        if torch.is_grad_enabled():
            for tensor in arguments[: self.num_tensors]:
                if tensor is not None and tensor.requires_grad:
                    return self._node.apply(keys, *arguments)
        return self._run_below_autograd(keys, *arguments)

    def _run_below_autograd(self, keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keys is None:
                return self.run(*arguments)
            return self.operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def _save(self, ctx: Any, keys: Any, *arguments: Any) -> Any:
        outputs = self._run_below_autograd(keys, *arguments)
        kept = _as_tuple(outputs)[self.num_differentiable :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(self.num_differentiable > 1)  # no zeros for kept outputs
        ctx.save_for_backward(*arguments[: self.num_tensors], *kept)
        ctx.others = arguments[self.num_tensors :]
        return outputs

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.differentiable:
            raise RuntimeError(f"{self.name} has no gradients: call it under torch.no_grad()")
        if grads[0] is None:
            return (None,) * (1 + self.num_tensors + len(ctx.others))
        saved = ctx.saved_tensors  # read once: activation checkpointing allows a single unpack
        given = [grad.contiguous() for grad in grads[: self.num_differentiable] if grad is not None]
        arguments = (*given, *saved, *ctx.others)
        if torch.is_grad_enabled():
            found = self._reference_gradients(*arguments, create_graph=True)
        elif all(map(_is_ordinary, given)) and self._needs_no_dispatcher(saved):
            found = self.run_backward(*arguments)
        else:
            found = self._gradients(*arguments)
        wanted = (None if x is None else grad for x, grad in zip(saved[: self.num_tensors], found, strict=True))
        return None, *wanted, *(None for _ in ctx.others)

    def _reference_gradients(self, *arguments: Any, create_graph: bool) -> tuple[Tensor, ...]:
        grads, inputs = arguments[: self.num_differentiable], arguments[self.num_differentiable :]
        tensors, others = inputs[: self.num_tensors], inputs[self.num_tensors + self.kept :]
        with without_autocast(inputs[0]), torch.enable_grad(), _autograd_enabled():
            if create_graph:  # views, because a tensor may be given twice, or be computed from another
                tensors = tuple(None if x is None else x.view_as(x) for x in tensors)
            else:
                tensors = tuple(None if x is None else x.detach().requires_grad_() for x in tensors)
            outputs = _as_tuple(self.reference(*tensors, *others))[: self.num_differentiable]
            leaves = [x for x in tensors if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=create_graph, materialize_grads=True))
        wanted = [x is not None and x.requires_grad for x in tensors]
        return tuple(next(found).contiguous() if is_wanted else grads[0].new_empty(0) for is_wanted in wanted)


def _define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define an operator with the same kernel on all devices.

    ``torch.library.custom_op`` could also define its gradients, but then takes 50 us more per call.
    """
    _LIBRARY.define(f"{name}({signature}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spatial_mamba::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.spatial_mamba, name).default


def _is_ordinary(x: Tensor) -> bool:
    """Whether only the kernels of a device see calls with this gradient."""
    return (torch._C._dispatch_keys(x) & torch._C._after_autograd_keyset).raw_repr() in _ORDINARY


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def _autograd_enabled() -> Iterator[None]:
    """Enable autograd inside a custom operator, where PyTorch excludes its dispatch keys."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield
