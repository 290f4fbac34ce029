"""First-order linear recurrence along the last dimension, as a work-efficient parallel scan."""

import torch
from torch import Tensor


def linear_recurrence(decays: Tensor, inputs: Tensor) -> Tensor:
    """Solve ``h[0] = inputs[0]``, ``h[t + 1] = decays[t] * h[t] + inputs[t + 1]``.

    Neighbouring steps are composed pairwise, so the work is linear in L and the depth logarithmic.
    Decays are only ever multiplied with each other, never divided or accumulated in logarithms:
    with decays in [0, 1] nothing can overflow, and a decay that underflows to 0 simply forgets the past.
    Differentiable any number of times.

    Args:
        decays: (..., L - 1), the factor that carries step t into step t + 1.
        inputs: (..., L) with L >= 1, of the same dtype.

    Returns:
        The states, (..., L), in the memory order of ``inputs``.
    """
    return _LinearRecurrence.apply(decays, inputs)


class _LinearRecurrence(torch.autograd.Function):
    """Saves only the decays and the states; the gradient is the same recurrence run backwards in time."""

    @staticmethod
    def forward(ctx, decays: Tensor, inputs: Tensor) -> Tensor:
        states = _scan_pairwise(decays, inputs)
        ctx.save_for_backward(decays, states)
        return states

    @staticmethod
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor, Tensor]:
        decays, states = ctx.saved_tensors
        grad_inputs = linear_recurrence(decays.flip(-1), grad_states.flip(-1)).flip(-1)
        grad_decays = grad_inputs[..., 1:] * states[..., :-1]
        return grad_decays, grad_inputs


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
