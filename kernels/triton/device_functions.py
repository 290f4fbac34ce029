"""Device functions for all kernels: loads, softplus, and the composition of segments of the scan."""

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
    # log(1 + e), corrected for the part of e that is lost in rounding 1 + e.
    log1p = tl.where(sum_ == 1.0, e, tl.log(sum_) * (e / kept))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def compose(decay, state, next_decay, next_state) -> tuple[tl.tensor, tl.tensor]:
    """Compose two consecutive segments ``h -> decay h + state``."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def compose_adjoint(next_decay, next_grad, next_factor, decay, grad, factor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Compose two segments of ``lambda_t = g_t + a_(t+1) lambda_(t+1)``, the later one first, for a reverse scan.

    A segment from token t on consists of its decay ``a_t``, and of ``grad`` and ``factor`` in
    ``lambda_t = grad + factor x``, where the gradient ``x = a lambda`` enters after its end. A single token is
    ``(a_t, g_t, 1)``. Since each token has its own decay, decays need not be shifted against gradients.
    """
    through = factor * next_decay
    return decay, grad + through * next_grad, through * next_factor
