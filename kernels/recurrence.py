"""The first-order linear recurrence, as a work-efficient parallel scan and in a form for exported graphs."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends

LARGEST_BLOCK = 8  # tokens that `scan_in_blocks` processes one after the other


def linear_recurrence(decays: Tensor, inputs: Tensor) -> Tensor:
    """Solve ``h[0] = inputs[0]``, ``h[t + 1] = decays[t] * h[t] + inputs[t + 1]``.

    Neighbouring steps are composed pairwise, so the work is linear in L and the depth logarithmic.
    Decays are only multiplied, never divided or summed as logarithms: decays in [0, 1] cannot overflow, and a decay
    that underflows to 0 forgets the past.
    Differentiable any number of times, also in forward mode and under transforms of torch.func.

    Args:
        decays: (..., L - 1), the factors from step t to step t + 1.
        inputs: (..., L) with L >= 1, of the same dtype.

    Returns:
        The states, (..., L), in the memory order of ``inputs``.
    """
    if backends.custom_operators_fail():
        tokens = [x.flatten(end_dim=-2).t()[None] for x in (F.pad(decays, (1, 0)), inputs)]  # (1, L, others)
        return scan_in_blocks(*tokens).squeeze(0).t().reshape(inputs.shape)
    return _operator(decays, inputs)


@torch.library.custom_op("spatial_mamba::linear_recurrence", mutates_args=())
def _operator(decays: Tensor, inputs: Tensor) -> Tensor:
    """A single operator for compilers, which would otherwise trace many small steps."""
    return _scan_pairwise(decays, inputs)


@_operator.register_fake
def _(decays: Tensor, inputs: Tensor) -> Tensor:
    return torch.empty_like(inputs)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    decays, _ = inputs
    ctx.save_for_backward(decays, output)


def _backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient is the same recurrence, backwards in time. It needs only decays and states."""
    decays, states = ctx.saved_tensors
    grad_inputs = _operator(decays.flip(-1), grad_states.flip(-1)).flip(-1)
    return grad_inputs[..., 1:] * states[..., :-1], grad_inputs


_operator.register_autograd(_backward, setup_context=_setup_context)


def _scan_pairwise(decays: Tensor, inputs: Tensor) -> Tensor:
    length = inputs.shape[-1]
    if length == 1:
        return inputs.clone()
    into_odd, into_even = decays[..., 0::2], decays[..., 1::2]
    pairs = length // 2

    # h[2k + 1] in terms of h[2k - 1]: a recurrence of half the length.
    odd_inputs = torch.addcmul(inputs[..., 1::2], into_odd, inputs[..., : 2 * pairs : 2])
    odd_decays = into_odd[..., 1:] * into_even[..., : pairs - 1]
    odd_states = _scan_pairwise(odd_decays, odd_inputs)

    states = torch.empty_like(inputs)
    states[..., 0] = inputs[..., 0]
    states[..., 1::2] = odd_states
    states[..., 2::2] = torch.addcmul(inputs[..., 2::2], into_even, odd_states[..., : into_even.shape[-1]])
    return states


def scan_in_blocks(decays: Tensor, inputs: Tensor) -> Tensor:
    """Solve ``h[0] = inputs[0]``, ``h[t] = decays[t] * h[t - 1] + inputs[t]`` in few, large, out-of-place operations.

    This form is for exported graphs, where every operation and every copy costs time. All blocks of tokens are scanned
    in parallel, token by token. Their last states form a shorter recurrence, which is solved in the same way. Its
    solution gives the states before the blocks, from which the blocks are scanned again. The work is linear in L, and
    the number of operations is proportional to log L. Decays are only multiplied, as in `linear_recurrence`.

    Args:
        decays: (batch, L, dim), finite, the factors from step t - 1 to step t; the first is not used.
        inputs: (batch, L, dim) with L >= 1, of the same dtype.

    Returns:
        The states, (batch, L, dim).
    """
    length = inputs.shape[1]
    sizes = _block_sizes(length)
    missing = math.prod(sizes) - length
    if missing:
        decays, inputs = (F.pad(x, (0, 0, 0, missing)) for x in (decays, inputs))
    states = _scan_blocks(decays, inputs, sizes)
    return states[:, :length] if missing else states


def _scan_blocks(decays: Tensor, inputs: Tensor, sizes: Sequence[int]) -> Tensor:
    """The states (batch, L, dim), where L is the product of the block sizes, innermost first."""
    size, *outer_sizes = sizes
    blocks = (inputs.shape[1] // size, size)
    # For each position in a block, a tensor (batch, blocks, 1, dim).
    a, x = (tokens.unflatten(1, blocks).split(1, dim=2) for tokens in (decays, inputs))
    first = x[0]
    if outer_sizes:
        last, passed = x[0], a[0]
        for k in range(1, size):
            last, passed = x[k] + a[k] * last, a[k] * passed
        lasts = _scan_blocks(passed.flatten(1, 2), last.flatten(1, 2), outer_sizes)
        before = F.pad(lasts[:, :-1], (0, 0, 1, 0)).unflatten(1, (-1, 1))
        first = x[0] + a[0] * before
    states = [first]
    for k in range(1, size):
        states.append(x[k] + a[k] * states[-1])
    return torch.cat(states, dim=2).flatten(1, 2)


@cache
def _block_sizes(length: int) -> tuple[int, ...]:
    """Sizes of nested blocks for ``length`` tokens: those with the least padding, and among these the fewest."""
    if length <= LARGEST_BLOCK:
        return (length,)
    plans = [(size, *_block_sizes(math.ceil(length / size))) for size in range(LARGEST_BLOCK, 1, -1)]
    return min(plans, key=lambda sizes: (math.prod(sizes), len(sizes)))
