"""Scan, state fusion and read-out, with the states in a temporary float32 map between the kernels.

If there are too few images and channels to fill the GPU, the scan runs over bands of rows in parallel: first the map
from the state before a band to the state after it, then the states before all bands, then the bands themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import channel_block, compose, compose_adjoint, load_float, softplus
from .launch import PROGRAMS_PER_MULTIPROCESSOR, block, cdiv, kernel, multiprocessors, on_device_of_first
from .state_fusion import PART_CHANNELS, launch_fuse, launch_fuse_adjoint, launch_tap_gradients

SCAN_TOKENS, ADJOINT_TOKENS, PRODUCT_TOKENS = 32, 16, 32  # per iteration of a program
PRODUCT_PRECISION = "ieee" if torch.version.hip else "tf32x3"  # AMD's GPUs lack TF32


class _Sizes(NamedTuple):
    """Sizes of the map, and the rows per band of its scan."""

    batch: int
    height: int
    width: int
    dim: int
    rank: int
    rows: int

    @property
    def bands(self) -> int:
        return cdiv(self.height, self.rows)


def _sizes_of(u: Tensor, step_weight: Tensor) -> _Sizes:
    batch, height, width, dim = u.shape
    programs = batch * cdiv(dim, PART_CHANNELS)
    bands = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(u.device) // programs)
    return _Sizes(batch, height, width, dim, step_weight.shape[1], rows=cdiv(height, bands))


@on_device_of_first
def structure_aware_scan(
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    offsets: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(u, dtype=out_dtype)
    row_states = taps.new_empty(u.shape[0], u.shape[1], u.shape[3])
    if u.numel() == 0:
        return y, row_states
    sizes = _sizes_of(u, step_weight)
    inputs = (u, projection, step_weight.t().contiguous(), step_bias, A_log)
    carries = _carries(_summarise_bands, sizes, inputs, reverse=False)
    h = torch.empty_like(u, dtype=taps.dtype)
    _launch(_scan_bands, sizes, SCAN_TOKENS, *inputs, carries, h, row_states)
    launch_fuse(h, taps, offsets, y, u, projection, D)
    return y, row_states


@on_device_of_first
def structure_aware_scan_backward(
    grad_out: Tensor,
    u: Tensor,
    projection: Tensor,
    step_weight: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    taps: Tensor,
    row_states: Tensor,
    offsets: Sequence[int],
) -> tuple[Tensor, ...]:
    if u.numel() == 0:
        return tuple(torch.zeros_like(x) for x in (u, projection, step_weight, step_bias, A_log, D, taps))
    sizes = _sizes_of(u, step_weight)
    steps = (projection, step_weight.t().contiguous(), step_bias, A_log)
    h = torch.empty_like(u, dtype=taps.dtype)
    _launch(_scan_bands, sizes, SCAN_TOKENS, u, *steps, row_states[:, :: sizes.rows].contiguous(), h, None)

    grad_h = torch.empty_like(h)
    launch_fuse_adjoint(grad_out, taps, offsets, grad_h, projection)
    # Three kernels write to it, each one sum per block of channels; the blocks are added at the end.
    grad_projections = taps.new_empty(cdiv(sizes.dim, PART_CHANNELS), *projection.shape)
    grad_taps = launch_tap_gradients(grad_out, h, taps, offsets, projection, grad_projections)

    carries = _carries(_summarise_bands_adjoint, sizes, (grad_h, *steps), reverse=True)
    grad_u, grad_step = torch.empty_like(u), torch.empty_like(h)
    grad_A_log, grad_D = torch.empty_like(carries), torch.empty_like(carries)
    grads = (grad_u, grad_step, grad_projections, grad_A_log, grad_D)
    _launch(_scan_bands_adjoint, sizes, ADJOINT_TOKENS, grad_h, *steps, carries, u, D, h, grad_out, *grads)

    grad_weight, grad_bias = _launch_step_products(sizes, grad_step, projection, step_weight, grad_projections)
    grad_projection = grad_projections.sum(0).to(projection.dtype)
    return grad_u, grad_projection, grad_weight, grad_bias, grad_A_log.sum((0, 1)), grad_D.sum((0, 1)), grad_taps


def _carries(summarise: triton.JITFunction, sizes: _Sizes, inputs: tuple[Tensor, ...], reverse: bool) -> Tensor:
    """The state before each band, (batch, bands, dim); in reverse, the gradient of the state after it."""
    carries = inputs[-1].new_zeros(sizes.batch, sizes.bands, sizes.dim)
    if sizes.bands > 1:
        decays, ends = torch.empty_like(carries), torch.empty_like(carries)
        _launch(summarise, sizes, SCAN_TOKENS, *inputs, decays, ends)
        block_dim = block(sizes.dim, 128)
        _carry_over_bands[sizes.batch, cdiv(sizes.dim, block_dim)](
            decays, ends, carries, sizes.bands, sizes.dim, REVERSE=reverse, BLOCK_DIM=block_dim
        )
    return carries


def _launch(kernel: triton.JITFunction, sizes: _Sizes, max_tokens: int, *tensors: Tensor | None) -> None:
    """One program per band and block of channels, which loops over blocks of tokens."""
    kernel[sizes.batch * sizes.bands, cdiv(sizes.dim, PART_CHANNELS)](
        *tensors,
        sizes.batch,
        sizes.height,
        sizes.width,
        sizes.dim,
        sizes.rows,
        RANK=sizes.rank,
        BLOCK_TOKENS=block(sizes.rows * sizes.width, max_tokens),
        BLOCK_DIM=block(sizes.dim, PART_CHANNELS),
    )


def _launch_step_products(
    sizes: _Sizes, grad_step: Tensor, projection: Tensor, step_weight: Tensor, grad_projections: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of step_weight and step_bias; that of r is written to the first channels of ``grad_projections``.

    PyTorch's products would round their factors to TF32 under a process-wide setting. In this kernel, NVIDIA's tensor
    cores add three TF32 products, as accurate as float32, in fewer registers than products without tensor cores.
    """
    tokens = sizes.batch * sizes.height * sizes.width
    channel_blocks = cdiv(sizes.dim, PART_CHANNELS)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(projection.device)
    splits = min(cdiv(wanted, channel_blocks), cdiv(tokens, PRODUCT_TOKENS))
    parts = step_weight.new_empty(splits, sizes.dim, sizes.rank + 1)
    _step_products[splits, channel_blocks](
        grad_step,
        projection,
        step_weight,
        grad_projections,
        parts,
        tokens,
        sizes.dim,
        RANK=sizes.rank,
        BLOCK_RANK=max(block(sizes.rank + 1, 1 << 30), 16),
        BLOCK_TOKENS=PRODUCT_TOKENS,
        BLOCK_DIM=max(block(sizes.dim, PART_CHANNELS), 16),
        PRECISION=PRODUCT_PRECISION,
        num_warps=8,
    )
    grad_weight, grad_bias = parts.sum(0).split([sizes.rank, 1], dim=1)
    return grad_weight.contiguous(), grad_bias.squeeze(1).contiguous()


# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _band(height, rows) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's image, and the first row and number of rows of its band."""
    bands = tl.cdiv(height, rows)
    row = tl.program_id(0) % bands * rows
    return (tl.program_id(0) // bands).to(tl.int64), row, tl.minimum(height - row, rows)


@triton.jit
def _rate(A_log, channel, in_dim) -> tl.tensor:
    """``exp(A_log)``, but finite: its product with a delta of zero must not be NaN."""
    exponent = load_float(A_log + channel, in_dim)
    return tl.exp(tl.where(exponent > 88.0, 88.0, exponent))


@triton.jit
def _biased_step(
    projection, step_weight, step_bias, token, inside, channel, in_dim, dim, RANK: tl.constexpr
) -> tl.tensor:
    """The deltas before softplus, (tokens, channels), from the weight as (RANK, dim)."""
    # Load a whole block, so that Triton distributes it over the threads like the other blocks.
    place = channel[None, :] + tl.zeros_like(token)[:, None]
    step = load_float(step_bias + place, inside[:, None] & in_dim[None, :])
    for k in tl.static_range(RANK):
        r = load_float(projection + token * (RANK + 2) + k, inside)
        step += r[:, None] * load_float(step_weight + k * dim + channel, in_dim)[None, :]
    return step


@triton.jit
def _decays_and_inputs(
    u, projection, step_weight, step_bias, A_log, token, inside, channel, in_dim, dim, RANK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Decays and inputs of a block of tokens; tokens beyond the end (not ``inside``) keep the state."""
    step = _biased_step(projection, step_weight, step_bias, token, inside, channel, in_dim, dim, RANK)
    delta = tl.where(inside[:, None], softplus(step), 0.0)
    rate = _rate(A_log, channel, in_dim)
    B = load_float(projection + token * (RANK + 2) + RANK, inside)
    tokens = load_float(u + token[:, None] * dim + channel[None, :], inside[:, None] & in_dim[None, :])
    return tl.exp(-delta * rate[None, :]), delta * B[:, None] * tokens


@triton.jit
def _pick(x, index) -> tl.tensor:
    """Row ``index`` of a (tokens, channels) block."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == index, x, 0.0), axis=0)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@kernel
def _summarise_bands(
    u,
    projection,
    step_weight,
    step_bias,
    A_log,
    decays,
    ends,
    batch,
    height,
    width,
    dim,
    rows,
    RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The map from the state h before a band to the state after it: ``decays h + ends``."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    image, first_row, band_rows = _band(height, rows)
    first = (image * height + first_row) * width
    decay, end = tl.full((BLOCK_DIM,), 1.0, tl.float32), tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, band_rows * width, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        token_decays, token_inputs = _decays_and_inputs(
            u, projection, step_weight, step_bias, A_log, first + t, t < band_rows * width, channel, in_dim, dim, RANK
        )
        block_decays, block_ends = tl.associative_scan((token_decays, token_inputs), 0, compose)
        decay, end = compose(decay, end, _pick(block_decays, BLOCK_TOKENS - 1), _pick(block_ends, BLOCK_TOKENS - 1))
    place = tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(decays + place, decay, mask=in_dim)
    tl.store(ends + place, end, mask=in_dim)


@kernel
def _carry_over_bands(decays, ends, carries, bands, dim, REVERSE: tl.constexpr, BLOCK_DIM: tl.constexpr) -> None:
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    carry = tl.zeros((BLOCK_DIM,), tl.float32)
    for k in range(bands):
        band = bands - 1 - k if REVERSE else k
        place = (tl.program_id(0).to(tl.int64) * bands + band) * dim + channel
        tl.store(carries + place, carry, mask=in_dim)
        carry = load_float(decays + place, in_dim) * carry + load_float(ends + place, in_dim)


@kernel
def _scan_bands(
    u,
    projection,
    step_weight,
    step_bias,
    A_log,
    carries,
    h,
    row_states,
    batch,
    height,
    width,
    dim,
    rows,
    RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The states of a band, from the state before it; with ``row_states`` also those before its rows."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    image, first_row, band_rows = _band(height, rows)
    first = (image * height + first_row) * width
    state = load_float(carries + tl.program_id(0).to(tl.int64) * dim + channel, in_dim)
    row_place = (image * height + first_row) * dim + channel
    if row_states is not None:
        tl.store(row_states + row_place, state, mask=in_dim)
    for start in range(0, band_rows * width, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        inside = t < band_rows * width
        token_decays, token_inputs = _decays_and_inputs(
            u, projection, step_weight, step_bias, A_log, first + t, inside, channel, in_dim, dim, RANK
        )
        block_decays, block_ends = tl.associative_scan((token_decays, token_inputs), 0, compose)
        states = block_ends + block_decays * state[None, :]
        state = _pick(states, BLOCK_TOKENS - 1)
        tl.store(h + (first + t)[:, None] * dim + channel[None, :], states, mask=inside[:, None] & in_dim[None, :])
        if row_states is not None:
            next_row = t // width + 1
            ends_row = (t % width == width - 1) & (next_row < band_rows)
            place = row_place[None, :] + next_row[:, None].to(tl.int64) * dim
            tl.store(row_states + place, states, mask=ends_row[:, None] & in_dim[None, :])


@kernel
def _summarise_bands_adjoint(
    grad_h,
    projection,
    step_weight,
    step_bias,
    A_log,
    decays,
    ends,
    batch,
    height,
    width,
    dim,
    rows,
    RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The map from the gradient x of the state after a band to that of the state before it: ``decays x + ends``."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    image, first_row, band_rows = _band(height, rows)
    first = (image * height + first_row) * width
    rate = _rate(A_log, channel, in_dim)
    decay, end = tl.full((BLOCK_DIM,), 1.0, tl.float32), tl.zeros((BLOCK_DIM,), tl.float32)
    blocks = tl.cdiv(band_rows * width, BLOCK_TOKENS)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        inside = t < band_rows * width
        token = first + t
        step = _biased_step(projection, step_weight, step_bias, token, inside, channel, in_dim, dim, RANK)
        decay_into = tl.exp(-tl.where(inside[:, None], softplus(step), 0.0) * rate[None, :])
        grad = load_float(grad_h + token[:, None] * dim + channel[None, :], inside[:, None] & in_dim[None, :])
        first_decay, grad, factor = tl.associative_scan(
            (decay_into, grad, tl.full(grad.shape, 1.0, tl.float32)), 0, compose_adjoint, reverse=True
        )
        decay, end = compose(decay, end, _pick(first_decay * factor, 0), _pick(first_decay * grad, 0))
    place = tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(decays + place, decay, mask=in_dim)
    tl.store(ends + place, end, mask=in_dim)


@kernel
def _scan_bands_adjoint(
    grad_h,
    projection,
    step_weight,
    step_bias,
    A_log,
    carries,
    u,
    D,
    h,
    grad_out,
    grad_u,
    grad_step,
    grad_projections,
    grad_A_log,
    grad_D,
    batch,
    height,
    width,
    dim,
    rows,
    RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The gradients ``lambda_t = grad_h_t + a_(t+1) lambda_(t+1)`` of a band, and the gradients that depend on them."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    image, first_row, band_rows = _band(height, rows)
    first = (image * height + first_row) * width
    A = -_rate(A_log, channel, in_dim)[None, :]
    skip = load_float(D + channel, in_dim)[None, :]
    band_place = tl.program_id(0).to(tl.int64) * dim + channel
    entering = load_float(carries + band_place, in_dim)
    sum_A_log = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    sum_D = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    blocks = tl.cdiv(band_rows * width, BLOCK_TOKENS)
    for k in range(blocks):
        t = (blocks - 1 - k) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        inside = t < band_rows * width
        token = first + t
        place = token[:, None] * dim + channel[None, :]
        mask = inside[:, None] & in_dim[None, :]

        step = _biased_step(projection, step_weight, step_bias, token, inside, channel, in_dim, dim, RANK)
        delta = tl.where(inside[:, None], softplus(step), 0.0)
        decay = tl.exp(delta * A)
        grad = load_float(grad_h + place, mask)
        _, grad, factor = tl.associative_scan(
            (decay, grad, tl.full(grad.shape, 1.0, tl.float32)), 0, compose_adjoint, reverse=True
        )
        grad_state = grad + factor * entering[None, :]  # lambda
        entering = _pick(decay * grad_state, 0)

        B = load_float(projection + token * (RANK + 2) + RANK, inside)[:, None]
        tokens = load_float(u + place, mask)
        grad_y = load_float(grad_out + place, mask)
        has_past = mask & (token > image * height * width)[:, None]
        decayed_past = decay * load_float(h + place - dim, has_past)

        tl.store(grad_u + place, grad_state * delta * B + grad_y * skip, mask=mask)
        tl.store(grad_step + place, grad_state * (B * tokens + A * decayed_past) * tl.sigmoid(step), mask=mask)
        part = tl.program_id(1).to(tl.int64) * batch * height * width + token
        grad_B = tl.sum(grad_state * delta * tokens, axis=1)
        tl.store(grad_projections + part * (RANK + 2) + RANK, grad_B, mask=inside)
        sum_A_log += grad_state * decayed_past * delta * A
        sum_D += grad_y * tokens
    tl.store(grad_A_log + band_place, tl.sum(sum_A_log, axis=0), mask=in_dim)
    tl.store(grad_D + band_place, tl.sum(sum_D, axis=0), mask=in_dim)


@kernel
def _step_products(
    grad_step,
    projection,
    step_weight,
    grad_projections,
    parts,
    tokens,
    dim,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """``grad_step step_weight`` per token; ``grad_step^T [r, 1]``, where 1 is for the bias, over a split's tokens."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    k = tl.arange(0, BLOCK_RANK)
    weight = load_float(step_weight + channel[:, None] * RANK + k[None, :], in_dim[:, None] & (k < RANK)[None, :])
    sums = tl.zeros((BLOCK_DIM, BLOCK_RANK), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_TOKENS, tokens, tl.num_programs(0) * BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        inside = token < tokens
        in_r = inside[:, None] & (k < RANK)[None, :]
        grad = load_float(grad_step + token[:, None] * dim + channel[None, :], inside[:, None] & in_dim[None, :])
        r = load_float(projection + token[:, None] * (RANK + 2) + k[None, :], in_r)
        sums += tl.dot(tl.trans(grad), tl.where((k == RANK)[None, :], 1.0, r), input_precision=PRECISION)
        part = tl.program_id(1).to(tl.int64) * tokens + token
        grad_r = tl.dot(grad, weight, input_precision=PRECISION)
        tl.store(grad_projections + part[:, None] * (RANK + 2) + k[None, :], grad_r, mask=in_r)
    place = (tl.program_id(0) * dim + channel)[:, None] * (RANK + 1) + k[None, :]
    tl.store(parts + place, sums, mask=in_dim[:, None] & (k <= RANK)[None, :])
