"""The selective scan in the layout of mamba_ssm, tokens contiguous: N states per channel, scanned together.

A program handles a block of channels with the same B and C, and loops over blocks of tokens. The backward pass first
repeats the forward scan to save the states between blocks, then loops backwards and recomputes those within each block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import compose, compose_adjoint, load_float, softplus
from .launch import block, cdiv, kernel, on_device_of_first

BLOCK_ELEMENTS = 2048  # channels x states x tokens per block: 16 per thread
MAX_TOKENS = 64


@on_device_of_first
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    batch, dim, length = u.shape
    d_state = A.shape[1]
    out = A.new_empty(batch, dim, d_state, length) if C is None else torch.empty_like(u)
    last_state = A.new_empty(batch, dim, d_state)
    _launch_scan(delta_softplus, u, delta, A, B, C, D, z, delta_bias, out, last_state, None)
    return out, last_state


@on_device_of_first
def selective_scan_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    batch, dim, length = u.shape
    d_state, groups = A.shape[1], B.shape[1]
    grid, blocks = _blocks(u, A, groups)
    carries = A.new_empty(batch, cdiv(length, blocks["BLOCK_TOKENS"]), dim, d_state)
    _launch_scan(delta_softplus, u, delta, A, B, C, None, None, delta_bias, None, None, carries)

    def parts(weight: Tensor | None, count: int) -> Tensor | None:
        return None if weight is None else A.new_empty(count, *weight.shape)

    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)
    weight_parts = [parts(weight, batch) for weight in (A, D, delta_bias)]
    matrix_parts = [parts(matrix, cdiv(dim // groups, blocks["BLOCK_DIM"])) for matrix in (B, C)]
    if u.numel():
        _scan_backward[grid](
            grad_out,
            grad_last,
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            carries,
            grad_u,
            grad_delta,
            grad_z,
            *weight_parts,
            *matrix_parts,
            batch,
            dim,
            groups,
            length,
            d_state,
            SOFTPLUS=delta_softplus,
            **blocks,
        )

    def total(part: Tensor | None, dtype: torch.dtype) -> Tensor:
        return u.new_empty(0) if part is None else part.sum(0).to(dtype)

    grad_A, grad_D, grad_bias = (total(part, A.dtype) for part in weight_parts)
    grad_B, grad_C = (total(part, B.dtype) for part in matrix_parts)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, u.new_empty(0) if grad_z is None else grad_z, grad_bias


def _launch_scan(delta_softplus: bool, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *others: Tensor | None) -> None:
    """Run `_scan`. The last three tensors are results: outputs or states, last state, state before each token block."""
    if u.numel():
        groups = B.shape[1]
        grid, blocks = _blocks(u, A, groups)
        sizes = (u.shape[1], groups, u.shape[2], A.shape[1])
        _scan[grid](u, delta, A, B, *others, *sizes, SOFTPLUS=delta_softplus, **blocks)


def _blocks(u: Tensor, A: Tensor, groups: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, one program per sequence, group and block of its channels; and the block sizes."""
    batch, dim, length = u.shape
    block_states = block(A.shape[1], 1 << 30)
    block_tokens = block(length, max(min(MAX_TOKENS, BLOCK_ELEMENTS // block_states), 16))
    block_dim = block(dim // groups, max(BLOCK_ELEMENTS // (block_states * block_tokens), 1))
    blocks = dict(BLOCK_DIM=block_dim, BLOCK_STATES=block_states, BLOCK_TOKENS=block_tokens)
    return (batch * groups * cdiv(dim // groups, block_dim),), blocks


# --- Device functions; blocks are (channels, tokens), (states, tokens) or (channels, states, tokens) ------------------


@triton.jit
def _place(dim, groups, BLOCK_DIM: tl.constexpr) -> tuple[tl.tensor, ...]:
    """This program's sequence, group, block of channels within the group, the channels, and which of them exist."""
    channels = dim // groups  # of a group
    blocks = tl.cdiv(channels, BLOCK_DIM)
    block_of_all = tl.program_id(0) % (groups * blocks)
    sequence, group, part = tl.program_id(0) // (groups * blocks), block_of_all // blocks, block_of_all % blocks
    channel = part * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    return sequence.to(tl.int64), group, part, group * channels + channel, channel < channels


@triton.jit
def _load_step(delta, delta_bias, rows, channel, in_dim, t, inside, length) -> tl.tensor:
    """The biased deltas, before softplus."""
    step = load_float(delta + rows[:, None] * length + t[None, :], in_dim[:, None] & inside[None, :])
    if delta_bias is not None:
        step += load_float(delta_bias + channel, in_dim)[:, None]
    return step


@triton.jit
def _delta(step, in_dim, inside, SOFTPLUS: tl.constexpr) -> tl.tensor:
    """The deltas; 0 where there is no token, which keeps the state."""
    return tl.where(in_dim[:, None] & inside[None, :], softplus(step) if SOFTPLUS else step, 0.0)


@triton.jit
def _scan_block(decays, inputs, entering) -> tl.tensor:
    """States (channels, states, tokens) of a block, from the state ``entering`` before it."""
    flat: tl.constexpr = (decays.shape[0] * decays.shape[1], decays.shape[2])
    through, ends = tl.associative_scan((tl.reshape(decays, flat), tl.reshape(inputs, flat)), 1, compose)
    return tl.reshape(ends, decays.shape) + tl.reshape(through, decays.shape) * entering[:, :, None]


@triton.jit
def _pick(x, index) -> tl.tensor:
    """Token ``index`` of a (channels, states, tokens) block."""
    return tl.sum(tl.where(tl.arange(0, x.shape[2])[None, None, :] == index, x, 0.0), axis=2)


# --- Kernels; results whose pointer is None are omitted ---------------------------------------------------------------


@kernel
def _scan(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    out,
    last_state,
    carries,
    dim,
    groups,
    length,
    d_state,
    SOFTPLUS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Loop over the blocks of tokens, with all N states of a block of channels at once."""
    sequence, group, _, channel, in_dim = _place(dim, groups, BLOCK_DIM)
    rows = sequence * dim + channel
    matrix = sequence * groups + group  # of the B and C of this group
    n = tl.arange(0, BLOCK_STATES)
    in_state = in_dim[:, None] & (n < d_state)[None, :]
    A_ = load_float(A + channel[:, None] * d_state + n[None, :], in_state)
    state_rows = rows[:, None] * d_state + n[None, :]
    state = tl.zeros((BLOCK_DIM, BLOCK_STATES), tl.float32)
    blocks = tl.cdiv(length, BLOCK_TOKENS)
    for k in range(blocks):
        if carries is not None:
            place = ((sequence * blocks + k) * dim + channel)[:, None] * d_state + n[None, :]
            tl.store(carries + place, state, mask=in_state)
        t = k * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        inside = t < length
        mask = in_dim[:, None] & inside[None, :]
        place = rows[:, None] * length + t[None, :]
        matrix_place = (matrix * d_state + n)[:, None] * length + t[None, :]
        matrix_mask = (n < d_state)[:, None] & inside[None, :]

        step = _load_step(delta, delta_bias, rows, channel, in_dim, t, inside, length)
        delta_ = _delta(step, in_dim, inside, SOFTPLUS)
        u_ = load_float(u + place, mask)
        B_ = load_float(B + matrix_place, matrix_mask)
        decays = tl.exp(delta_[:, None, :] * A_[:, :, None])
        h = _scan_block(decays, (delta_ * u_)[:, None, :] * B_[None, :, :], state)
        state = _pick(h, BLOCK_TOKENS - 1)

        if out is not None:
            if C is None:
                states_place = state_rows[:, :, None] * length + t[None, None, :]
                tl.store(out + states_place, h, mask=in_state[:, :, None] & inside[None, None, :])
            else:
                y = tl.sum(h * load_float(C + matrix_place, matrix_mask)[None, :, :], axis=1)
                if D is not None:
                    y += load_float(D + channel, in_dim)[:, None] * u_
                if z is not None:
                    z_ = load_float(z + place, mask)
                    y *= z_ * tl.sigmoid(z_)
                tl.store(out + place, y, mask=mask)
    if last_state is not None:
        tl.store(last_state + state_rows, state, mask=in_state)


@kernel
def _scan_backward(
    grad_out,
    grad_last,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    carries,
    grad_u,
    grad_delta,
    grad_z,
    grad_A,
    grad_D,
    grad_bias,
    grad_B,
    grad_C,
    batch,
    dim,
    groups,
    length,
    d_state,
    SOFTPLUS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Loop backwards over the blocks; ``grad_state`` is the gradient lambda of the states of a block."""
    sequence, group, part, channel, in_dim = _place(dim, groups, BLOCK_DIM)
    rows = sequence * dim + channel
    matrix = sequence * groups + group  # of the B and C of this group
    matrix_part = part.to(tl.int64) * batch * groups + matrix
    n = tl.arange(0, BLOCK_STATES)
    in_state = in_dim[:, None] & (n < d_state)[None, :]
    A_ = load_float(A + channel[:, None] * d_state + n[None, :], in_state)
    state_rows = rows[:, None] * d_state + n[None, :]
    entering = load_float(grad_last + state_rows, in_state)  # the gradient that enters a block from the tokens after it

    sum_A = tl.zeros((BLOCK_DIM, BLOCK_STATES), tl.float32)
    sum_D = tl.zeros((BLOCK_DIM,), tl.float32)
    sum_bias = tl.zeros((BLOCK_DIM,), tl.float32)
    blocks = tl.cdiv(length, BLOCK_TOKENS)
    for back in range(blocks):
        k = blocks - 1 - back
        in_block = tl.arange(0, BLOCK_TOKENS)
        t = k * BLOCK_TOKENS + in_block
        inside = t < length
        mask = in_dim[:, None] & inside[None, :]
        place = rows[:, None] * length + t[None, :]
        matrix_place = (matrix * d_state + n)[:, None] * length + t[None, :]
        part_place = (matrix_part * d_state + n)[:, None] * length + t[None, :]
        matrix_mask = (n < d_state)[:, None] & inside[None, :]

        # The state before each token; for the first token that is the carry.
        carry = load_float(
            carries + ((sequence * blocks + k) * dim + channel)[:, None] * d_state + n[None, :], in_state
        )
        has_past = inside & (in_block > 0)
        step = _load_step(delta, delta_bias, rows, channel, in_dim, t - 1, has_past, length)
        delta_ = _delta(step, in_dim, has_past, SOFTPLUS)
        u_ = load_float(u + place - 1, in_dim[:, None] & has_past[None, :])
        B_ = load_float(B + matrix_place - 1, (n < d_state)[:, None] & has_past[None, :])
        decays = tl.exp(delta_[:, None, :] * A_[:, :, None])
        past = _scan_block(decays, (delta_ * u_)[:, None, :] * B_[None, :, :], carry)

        step = _load_step(delta, delta_bias, rows, channel, in_dim, t, inside, length)
        delta_ = _delta(step, in_dim, inside, SOFTPLUS)
        u_ = load_float(u + place, mask)
        B_ = load_float(B + matrix_place, matrix_mask)
        decays = tl.exp(delta_[:, None, :] * A_[:, :, None])
        past *= decays

        if C is None:
            states_place = state_rows[:, :, None] * length + t[None, None, :]
            grad = load_float(grad_out + states_place, in_state[:, :, None] & inside[None, None, :])
            grad_u_ = tl.zeros((BLOCK_DIM, BLOCK_TOKENS), tl.float32)
        else:
            C_ = load_float(C + matrix_place, matrix_mask)
            h = past + (delta_ * u_)[:, None, :] * B_[None, :, :]
            grad_y = load_float(grad_out + place, mask)
            if z is not None:
                z_ = load_float(z + place, mask)
                gate = tl.sigmoid(z_)
                y = tl.sum(h * C_[None, :, :], axis=1)
                if D is not None:
                    y += load_float(D + channel, in_dim)[:, None] * u_
                tl.store(grad_z + place, grad_y * y * gate * (1.0 + z_ * (1.0 - gate)), mask=mask)
                grad_y *= z_ * gate
            grad_u_ = tl.zeros((BLOCK_DIM, BLOCK_TOKENS), tl.float32)
            if D is not None:
                grad_u_ += load_float(D + channel, in_dim)[:, None] * grad_y
                sum_D += tl.sum(grad_y * u_, axis=1)
            tl.store(grad_C + part_place, tl.sum(h * grad_y[:, None, :], axis=0), mask=matrix_mask)
            grad = grad_y[:, None, :] * C_[None, :, :]

        flat: tl.constexpr = (BLOCK_DIM * BLOCK_STATES, BLOCK_TOKENS)
        factors = tl.full(flat, 1.0, tl.float32)
        _, ends, factors = tl.associative_scan(
            (tl.reshape(decays, flat), tl.reshape(grad, flat), factors), 1, compose_adjoint, reverse=True
        )
        grad_state = tl.reshape(ends, grad.shape) + tl.reshape(factors, grad.shape) * entering[:, :, None]
        entering = _pick(decays * grad_state, 0)

        grad_input = tl.sum(grad_state * B_[None, :, :], axis=1)
        grad_decay = grad_state * past  # times the decay
        grad_delta_ = grad_input * u_ + tl.sum(grad_decay * A_[:, :, None], axis=1)
        if SOFTPLUS:
            grad_delta_ *= tl.sigmoid(step)
        grad_delta_ = tl.where(mask, grad_delta_, 0.0)
        tl.store(grad_delta + place, grad_delta_, mask=mask)
        tl.store(grad_u + place, grad_u_ + grad_input * delta_, mask=mask)
        grad_B_ = tl.sum(grad_state * (delta_ * u_)[:, None, :], axis=0)
        tl.store(grad_B + part_place, grad_B_, mask=matrix_mask)
        sum_A += tl.sum(grad_decay * delta_[:, None, :], axis=2)
        sum_bias += tl.sum(grad_delta_, axis=1)

    tl.store(grad_A + state_rows, sum_A, mask=in_state)
    if D is not None:
        tl.store(grad_D + rows, sum_D, mask=in_dim)
    if delta_bias is not None:
        tl.store(grad_bias + rows, sum_bias, mask=in_dim)
