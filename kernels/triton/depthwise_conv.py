"""Depthwise 3x3 convolution and its adjoint. A program moves down a tile of columns and reads each row once.

A row is read by three loads, each shifted by a column. The rows of a tile are unrolled, so that loads overlap with the
sums of earlier rows.

The adjoint needs the gradient before the SiLU at all neighbours of a token. A separate kernel writes it to a temporary
map of the I/O dtype. Recomputing it in the adjoint, also for the neighbouring columns, would take three times the
multiply-adds and exponentials, which costs more than the memory traffic of the map.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import channel_block, load_float
from .launch import PROGRAMS_PER_MULTIPROCESSOR, block, cdiv, kernel, multiprocessors, on_device_of_first

MAX_ROWS, TILE_WIDTH, TILE_CHANNELS = 8, 8, 64  # 4 elements of a row per thread
WARPS, ADJOINT_WARPS = 4, 8  # the adjoint keeps its sums in registers


@on_device_of_first
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        grid, blocks = _tiles(x)
        _convolve[grid](x, weight, bias, out, *x.shape[1:], x.stride(2), EPILOGUE=epilogue, **blocks, num_warps=WARPS)
    return out


@on_device_of_first
def depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.zeros_like(weight), torch.zeros_like(bias)
    (tiles, channel_blocks), blocks = _tiles(x)
    programs = min(tiles, cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), channel_blocks))
    grid = (programs, channel_blocks)
    parts = weight.new_empty(programs, 10 * x.shape[3])
    sizes, stride, grad_stride = x.shape[1:], x.stride(2), grad_x.stride(2)
    if epilogue == "silu":
        grad_convolved = torch.empty_like(grad_out)
        tensors = (x, weight, bias, grad_out, grad_convolved, parts)
        _before_silu[grid](*tensors, tiles, *sizes, stride, **blocks, num_warps=WARPS)
        tensors = (grad_convolved, None, weight, grad_x, None)
    else:
        tensors = (grad_out, x, weight, grad_x, parts)
    options = dict(RESIDUAL=epilogue == "residual", num_warps=ADJOINT_WARPS)
    _adjoint[grid](*tensors, tiles, *sizes, stride, grad_stride, **blocks, **options)
    sums = parts.sum(0)
    return sums[: weight.numel()].view_as(weight), sums[weight.numel() :].clone()  # results must share no memory


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The numbers of tiles and of blocks of channels, and the block sizes."""
    batch, height, width, dim = x.shape
    block_width, block_dim = block(width, TILE_WIDTH), block(dim, TILE_CHANNELS)
    bands = cdiv(height, MAX_ROWS)
    blocks = dict(ROWS=cdiv(height, bands), BLOCK_WIDTH=block_width, BLOCK_DIM=block_dim)
    return (batch * bands * cdiv(width, block_width), cdiv(dim, block_dim)), blocks


# --- Device functions; blocks are (columns, channels) -----------------------------------------------------------------


@triton.jit
def _tile(index, height, width, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The first token of a tile's image, the tile's first row, and its columns."""
    across = tl.cdiv(width, BLOCK_WIDTH)
    tiles = across * tl.cdiv(height, ROWS)
    image, tile = index // tiles, index % tiles
    column = tile % across * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    return image.to(tl.int64) * height * width, tile // across * ROWS, column


@triton.jit
def _load(tokens, stride, first, row, column, height, width, channel, in_dim) -> tl.tensor:
    """Some columns of a row; 0 outside the map."""
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (first + row * width + column)[:, None] * stride + channel[None, :]
    return load_float(tokens + place, inside[:, None] & in_dim[None, :])


@triton.jit
def _store(tokens, stride, first, row, column, height, width, channel, in_dim, values) -> None:
    inside = (column < width) & (row < height)
    place = (first + row * width + column)[:, None] * stride + channel[None, :]
    tl.store(tokens + place, values, mask=inside[:, None] & in_dim[None, :])


@triton.jit
def _taps(weight, channel, in_dim) -> tuple[tl.tensor, ...]:
    taps = ()
    for k in tl.static_range(9):
        taps += (load_float(weight + channel * 9 + k, in_dim)[None, :],)
    return taps


@triton.jit
def _store_sums(parts, sums, dim, channel, in_dim) -> None:
    """Sum over the columns and write to (programs, 10 dim): the taps of all channels, (dim, 9), then the biases."""
    parts += tl.program_id(0) * 10 * dim
    for k in tl.static_range(9):
        tl.store(parts + channel * 9 + k, tl.sum(sums[k], axis=0), mask=in_dim)
    tl.store(parts + 9 * dim + channel, tl.sum(sums[9], axis=0), mask=in_dim)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@kernel
def _convolve(
    x,
    weight,
    bias,
    out,
    height,
    width,
    dim,
    stride,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    first, first_row, column = _tile(tl.program_id(0), height, width, ROWS, BLOCK_WIDTH)
    taps = _taps(weight, channel, in_dim)
    start = load_float(bias + channel, in_dim)[None, :] + tl.zeros((BLOCK_WIDTH, BLOCK_DIM), tl.float32)
    before, here = start, start  # sums of the previous row and of the current one
    for i in tl.static_range(ROWS + 2):
        row = first_row + i - 1
        left = _load(x, stride, first, row, column - 1, height, width, channel, in_dim)
        centre = _load(x, stride, first, row, column, height, width, channel, in_dim)
        right = _load(x, stride, first, row, column + 1, height, width, channel, in_dim)
        if i >= 2:
            result = before + taps[6] * left + taps[7] * centre + taps[8] * right
            if EPILOGUE == "silu":
                result *= tl.sigmoid(result)
            _store(out, dim, first, row - 1, column, height, width, channel, in_dim, result)
        before = here + taps[3] * left + taps[4] * centre + taps[5] * right
        if EPILOGUE == "residual":
            before += centre
        here = start + taps[0] * left + taps[1] * centre + taps[2] * right


@kernel
def _before_silu(
    x,
    weight,
    bias,
    grad_out,
    grad_convolved,
    parts,
    tiles,
    height,
    width,
    dim,
    stride,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The gradient before the SiLU in some tiles, and their contribution to the gradients of weight and bias."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    taps = _taps(weight, channel, in_dim)
    start = load_float(bias + channel, in_dim)[None, :]
    zeros = tl.zeros((BLOCK_WIDTH, BLOCK_DIM), tl.float32)
    sums = ()
    for _ in tl.static_range(10):
        sums += (zeros,)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, first_row, column = _tile(tile, height, width, ROWS, BLOCK_WIDTH)
        above, here = (zeros, zeros, zeros), (zeros, zeros, zeros)  # rows, shifted left, unshifted, and shifted right
        for i in tl.static_range(ROWS + 2):
            row = first_row + i - 1
            below = (
                _load(x, stride, first, row, column - 1, height, width, channel, in_dim),
                _load(x, stride, first, row, column, height, width, channel, in_dim),
                _load(x, stride, first, row, column + 1, height, width, channel, in_dim),
            )
            if i >= 2:
                neighbours = above + here + below
                convolved = start + zeros
                for k in tl.static_range(9):
                    convolved += taps[k] * neighbours[k]
                sigmoid = tl.sigmoid(convolved)
                grad = _load(grad_out, dim, first, row - 1, column, height, width, channel, in_dim)
                grad *= sigmoid * (1.0 + convolved * (1.0 - sigmoid))
                _store(grad_convolved, dim, first, row - 1, column, height, width, channel, in_dim, grad)
                new_sums = ()
                for k in tl.static_range(9):
                    new_sums += (sums[k] + grad * neighbours[k],)
                new_sums += (sums[9] + grad,)
                sums = new_sums
            above, here = here, below
    _store_sums(parts, sums, dim, channel, in_dim)


@kernel
def _adjoint(
    grad_convolved,
    x,
    weight,
    grad_x,
    parts,
    tiles,
    height,
    width,
    dim,
    stride,
    grad_stride,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The gradient of the tokens of some tiles; with ``parts`` also their contribution to those of weight and bias.

    All are products with the gradients around a token, so only the gradients are read with their neighbours.
    """
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    taps = _taps(weight, channel, in_dim)
    zeros = tl.zeros((BLOCK_WIDTH, BLOCK_DIM), tl.float32)
    sums = ()
    for _ in tl.static_range(10):
        sums += (zeros,)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, first_row, column = _tile(tile, height, width, ROWS, BLOCK_WIDTH)
        before, here = zeros, zeros  # sums of the previous row and of the current one
        token_above, token_here = zeros, zeros  # 0 outside the tile
        for i in tl.static_range(ROWS + 2):
            row = first_row + i - 1
            left = _load(grad_convolved, dim, first, row, column - 1, height, width, channel, in_dim)
            centre = _load(grad_convolved, dim, first, row, column, height, width, channel, in_dim)
            right = _load(grad_convolved, dim, first, row, column + 1, height, width, channel, in_dim)
            if i >= 2:
                result = before + taps[0] * right + taps[1] * centre + taps[2] * left
                _store(grad_x, grad_stride, first, row - 1, column, height, width, channel, in_dim, result)
            before = here + taps[3] * right + taps[4] * centre + taps[5] * left
            if RESIDUAL:
                before += centre
            here = taps[6] * right + taps[7] * centre + taps[8] * left

            if parts is not None:
                token_below = zeros
                if i < ROWS:
                    token_below = _load(x, stride, first, row + 1, column, height, width, channel, in_dim)
                bias_sum = sums[9]
                if i >= 1 and i <= ROWS:
                    bias_sum += centre
                sums = (
                    sums[0] + token_above * right,
                    sums[1] + token_above * centre,
                    sums[2] + token_above * left,
                    sums[3] + token_here * right,
                    sums[4] + token_here * centre,
                    sums[5] + token_here * left,
                    sums[6] + token_below * right,
                    sums[7] + token_below * centre,
                    sums[8] + token_below * left,
                    bias_sum,
                )
                token_above, token_here = token_here, token_below
    if parts is not None:
        _store_sums(parts, sums, dim, channel, in_dim)
