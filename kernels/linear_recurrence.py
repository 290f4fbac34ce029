"""First-order linear recurrence along the last dimension, as a work-efficient parallel scan."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("spatial_mamba::linear_recurrence", mutates_args=())
def linear_recurrence(decays: Tensor, inputs: Tensor) -> Tensor:
    """Solve ``h[0] = inputs[0]``, ``h[t + 1] = decays[t] * h[t] + inputs[t + 1]``.

    Neighbouring steps are composed pairwise, so the work is linear in L and the depth logarithmic.
    Decays are only ever multiplied with each other, never divided or accumulated in logarithms:
    with decays in [0, 1] nothing can overflow, and a decay that underflows to 0 simply forgets the past.
    Differentiable any number of times. An operator of its own for compilers, which would otherwise meet the many
    small steps one by one.

    Args:
        decays: (..., L - 1), the factor that carries step t into step t + 1.
        inputs: (..., L) with L >= 1, of the same dtype.

    Returns:
        The states, (..., L), in the memory order of ``inputs``.
    """
    return _scan_pairwise(decays, inputs)


@linear_recurrence.register_fake
def _(decays: Tensor, inputs: Tensor) -> Tensor:
    return torch.empty_like(inputs)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    decays, _ = inputs
    ctx.save_for_backward(decays, output)


def _backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient is the same recurrence run backwards in time; only decays and states are saved for it."""
    decays, states = ctx.saved_tensors
    grad_inputs = linear_recurrence(decays.flip(-1), grad_states.flip(-1)).flip(-1)
    return grad_inputs[..., 1:] * states[..., :-1], grad_inputs


linear_recurrence.register_autograd(_backward, setup_context=_setup_context)


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
