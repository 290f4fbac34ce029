"""Device functions that the kernels share: loads, the step size, and the composition of stretches of the scan."""

import triton
import triton.language as tl


@triton.jit
def channel_block(dim, BLOCK_DIM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    channel = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    return channel, channel < dim


@triton.jit
def load_float(pointer, mask) -> tl.tensor:
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softplus(x) -> tl.tensor:
    """``log(1 + exp(x))`` to full precision on both sides of 0."""
    e = tl.exp(-tl.abs(x))
    sum_ = 1.0 + e
    kept = tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)
    # log(1 + e), times what rounding 1 + e has lost of e.
    log1p = tl.where(sum_ == 1.0, e, tl.log(sum_) * (e / kept))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def compose(decay, state, next_decay, next_state) -> tuple[tl.tensor, tl.tensor]:
    """Two stretches ``h -> decay h + state``, one after the other."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def compose_adjoint(next_decay, next_grad, next_share, decay, grad, share) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Two stretches of ``lambda_t = g_t + a_(t+1) lambda_(t+1)``, the later one first, as the reverse scan goes.

    A stretch that begins at token t is the decay ``a_t`` into it, and ``lambda_t = grad + share x`` in terms of the
    gradient ``x = a lambda`` that enters behind its end. A token alone is ``(a_t, g_t, 1)``. Each token brings its own
    decay, so that none has to be shifted against the gradients.
    """
    through = share * next_decay
    return decay, grad + through * next_grad, through * next_share
