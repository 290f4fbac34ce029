"""Depthwise 3x3 convolution and its adjoint. A program moves down a block of tiles, two columns each.

A thread has some channels of a tile. It keeps rows, or sums for the next rows, in registers, and reads each row once.

The adjoint needs the gradient before the SiLU at all neighbours of a token. A separate kernel writes it to a temporary
map of the I/O dtype. Recomputing it in the adjoint, also for the neighbouring columns, would take three times the
multiply-adds and exponentials, which costs more than the memory traffic of the map.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import contiguous_like
from .device_functions import channel_block, load_float
from .launch import PROGRAMS_PER_MULTIPROCESSOR, block, cdiv, kernel, multiprocessors, on_device_of_first

MAX_ROWS, COLUMNS = 14, 2  # of a tile
BLOCK_CHANNELS, WARPS = 64, 4
FORWARD_TILES, BACKWARD_TILES = 8, 4  # of a block: 4 and 2 channels per thread; the backward pass needs more registers


@on_device_of_first
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str) -> Tensor:
    out = contiguous_like(x)
    if x.numel():
        tiles, grid, blocks = _tiling(x, FORWARD_TILES)
        sizes = (tiles, *x.shape[1:], x.stride(2))
        _convolve[grid](x, weight, bias, out, *sizes, EPILOGUE=epilogue, **blocks, num_warps=WARPS)
    return out


@on_device_of_first
def depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.zeros_like(weight), torch.zeros_like(bias)
    tiles, (tile_blocks, channel_blocks), blocks = _tiling(x, BACKWARD_TILES)
    programs = min(tile_blocks, cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), channel_blocks))
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
    options = dict(RESIDUAL=epilogue == "residual", num_warps=WARPS)
    _adjoint[grid](*tensors, tiles, *sizes, stride, grad_stride, **blocks, **options)
    sums = parts.sum(0)
    return sums[: weight.numel()].view_as(weight), sums[weight.numel() :].clone()  # results must share no memory


def _tiling(x: Tensor, max_tiles: int) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """The number of tiles, the numbers of blocks of tiles and of channels, and the sizes of tiles and blocks."""
    batch, height, width, dim = x.shape
    bands = cdiv(height, MAX_ROWS)
    tiles = batch * bands * cdiv(width, COLUMNS)
    block_tiles, block_dim = block(tiles, max_tiles), block(dim, BLOCK_CHANNELS)
    sizes = dict(rows=cdiv(height, bands), COLUMNS=COLUMNS, BLOCK_TILES=block_tiles, BLOCK_DIM=block_dim)
    return tiles, (cdiv(tiles, block_tiles), cdiv(dim, block_dim)), sizes


# --- Device functions; blocks are (tiles, channels) -------------------------------------------------------------------


@triton.jit
def _tiles(
    index, tiles, height, width, rows, COLUMNS: tl.constexpr, BLOCK_TILES: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Of each tile: its first token, that token's row and column, and the map's height, which is 0 beyond the tiles."""
    tile = index * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, rows)
    row, column = tile // across % down * rows, tile % across * COLUMNS
    first = ((tile // (across * down)).to(tl.int64) * height + row) * width + column
    return first[:, None], row, column, tl.where(tile < tiles, height, 0)


@triton.jit
def _load_row(
    tokens, stride, i, row, column, height, width, in_dim, MARGIN: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Row i of each tile, with MARGIN columns on both sides; 0 outside the map. ``tokens`` points to the first."""
    in_row = ((row + i >= 0) & (row + i < height))[:, None] & in_dim[None, :]
    loaded = ()
    for k in tl.static_range(-MARGIN, COLUMNS + MARGIN):
        inside = (column + k >= 0) if k < 0 else (column + k < width)
        place = tokens + (i * width.to(tl.int64) * stride + k * stride)
        loaded += (load_float(place, inside[:, None] & in_row),)
    return loaded


@triton.jit
def _store_row(tokens, stride, i, row, column, height, width, in_dim, values) -> None:
    in_row = (row + i < height)[:, None] & in_dim[None, :]
    for k in tl.static_range(len(values)):
        place = tokens + (i * width.to(tl.int64) * stride + k * stride)
        tl.store(place, values[k], mask=(column + k < width)[:, None] & in_row)


@triton.jit
def _taps(weight, channel, in_dim, RESIDUAL: tl.constexpr) -> tuple[tl.tensor, ...]:
    taps = ()
    for k in tl.static_range(9):
        tap = load_float(weight + channel * 9 + k, in_dim)[None, :]
        taps += (tap + 1.0 if RESIDUAL and k == 4 else tap,)
    return taps


@triton.jit
def _mirror(tokens) -> tuple[tl.tensor, ...]:
    mirrored = ()
    for k in tl.static_range(9):
        mirrored += (tokens[8 - k],)
    return mirrored


@triton.jit
def _add_row(sum_, taps, FIRST: tl.constexpr, tokens, k: tl.constexpr) -> tl.tensor:
    """Add the products of three taps with the tokens around column k."""
    return sum_ + taps[FIRST] * tokens[k] + taps[FIRST + 1] * tokens[k + 1] + taps[FIRST + 2] * tokens[k + 2]


@triton.jit
def _weighted_sum(start, taps, tokens) -> tl.tensor:
    for k in tl.static_range(9):
        start += taps[k] * tokens[k]
    return start


@triton.jit
def _add_products(sums, tokens, factor, grad) -> tuple[tl.tensor, ...]:
    """Add to the sums for the gradients of the taps, and the gradient of a convolved token to that of the bias."""
    added = ()
    for k in tl.static_range(9):
        added += (sums[k] + tokens[k] * factor,)
    added += (sums[9] + grad,)
    return added


@triton.jit
def _store_sums(parts, sums, dim, channel, in_dim) -> None:
    """Sum over the tiles and write to (programs, 10 dim): the taps of all channels, (dim, 9), then the biases."""
    parts += tl.program_id(0) * 10 * dim
    for k in tl.static_range(9):
        tl.store(parts + channel * 9 + k, tl.sum(sums[k], axis=0), mask=in_dim)
    tl.store(parts + 9 * dim + channel, tl.sum(sums[9], axis=0), mask=in_dim)


@triton.jit
def _sigmoid(x) -> tl.tensor:
    """Takes fewer instructions than ``tl.sigmoid``, whose ``tl.exp`` is exact for denormals."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


# --- Kernels ----------------------------------------------------------------------------------------------------------


@kernel
def _convolve(
    x,
    weight,
    bias,
    out,
    tiles,
    height,
    width,
    dim,
    stride,
    rows,
    EPILOGUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    taps = _taps(weight, channel, in_dim, EPILOGUE == "residual")
    start = load_float(bias + channel, in_dim)[None, :] + tl.zeros((BLOCK_TILES, BLOCK_DIM), tl.float32)
    first, row, column, height = _tiles(tl.program_id(0), tiles, height, width, rows, COLUMNS, BLOCK_TILES)
    x += first * stride + channel[None, :]
    out += first * dim + channel[None, :]
    above = _load_row(x, stride, -1, row, column, height, width, in_dim, 1, COLUMNS)
    level = _load_row(x, stride, 0, row, column, height, width, in_dim, 1, COLUMNS)
    before, here = (), ()  # sums of a row and of the next one, so far
    for k in tl.static_range(COLUMNS):
        before += (_add_row(_add_row(start, taps, 0, above, k), taps, 3, level, k),)
        here += (_add_row(start, taps, 0, level, k),)
    for i in range(rows):
        below = _load_row(x, stride, i + 1, row, column, height, width, in_dim, 1, COLUMNS)
        results, next_before, next_here = (), (), ()
        for k in tl.static_range(COLUMNS):
            result = _add_row(before[k], taps, 6, below, k)
            if EPILOGUE == "silu":
                result *= _sigmoid(result)
            results += (result,)
            next_before += (_add_row(here[k], taps, 3, below, k),)
            next_here += (_add_row(start, taps, 0, below, k),)
        _store_row(out, dim, i, row, column, height, width, in_dim, results)
        before, here = next_before, next_here


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
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The gradient before the SiLU in some tiles, and their contribution to the gradients of weight and bias."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    taps = _taps(weight, channel, in_dim, False)
    zeros = tl.zeros((BLOCK_TILES, BLOCK_DIM), tl.float32)
    start = load_float(bias + channel, in_dim)[None, :] + zeros
    sums = (zeros,) * 10
    for index in range(tl.program_id(0), tl.cdiv(tiles, BLOCK_TILES), tl.num_programs(0)):
        first, row, column, end = _tiles(index, tiles, height, width, rows, COLUMNS, BLOCK_TILES)
        token, place = x + first * stride + channel[None, :], first * dim + channel[None, :]
        above = _load_row(token, stride, -1, row, column, end, width, in_dim, 1, COLUMNS)
        here = _load_row(token, stride, 0, row, column, end, width, in_dim, 1, COLUMNS)
        for i in range(rows):
            below = _load_row(token, stride, i + 1, row, column, end, width, in_dim, 1, COLUMNS)
            grads = _load_row(grad_out + place, dim, i, row, column, end, width, in_dim, 0, COLUMNS)
            grads_before = ()
            for k in tl.static_range(COLUMNS):
                tokens = above[k : k + 3] + here[k : k + 3] + below[k : k + 3]
                convolved = _weighted_sum(start, taps, tokens)
                sigmoid = _sigmoid(convolved)
                grad = grads[k] * sigmoid * (1.0 + convolved * (1.0 - sigmoid))
                sums = _add_products(sums, tokens, grad, grad)
                grads_before += (grad,)
            _store_row(grad_convolved + place, dim, i, row, column, end, width, in_dim, grads_before)
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
    rows,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The gradient of the tokens of some tiles; with ``parts`` also their contribution to those of weight and bias.

    All are products with the gradients around a token, so only the gradients are read with their neighbours.
    """
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    taps = _taps(weight, channel, in_dim, RESIDUAL)
    zeros = tl.zeros((BLOCK_TILES, BLOCK_DIM), tl.float32)
    sums = (zeros,) * 10
    for index in range(tl.program_id(0), tl.cdiv(tiles, BLOCK_TILES), tl.num_programs(0)):
        first, row, column, end = _tiles(index, tiles, height, width, rows, COLUMNS, BLOCK_TILES)
        grad = grad_convolved + first * dim + channel[None, :]
        grad_token = grad_x + first * grad_stride + channel[None, :]
        above = _load_row(grad, dim, -1, row, column, end, width, in_dim, 1, COLUMNS)
        here = _load_row(grad, dim, 0, row, column, end, width, in_dim, 1, COLUMNS)
        for i in range(rows):
            below = _load_row(grad, dim, i + 1, row, column, end, width, in_dim, 1, COLUMNS)
            if parts is not None:
                token = x + first * stride + channel[None, :]
                tokens = _load_row(token, stride, i, row, column, end, width, in_dim, 0, COLUMNS)
            results = ()
            for k in tl.static_range(COLUMNS):
                grads = _mirror(above[k : k + 3] + here[k : k + 3] + below[k : k + 3])
                if parts is not None:
                    sums = _add_products(sums, grads, tokens[k], here[k + 1])
                results += (_weighted_sum(zeros, taps, grads),)
            _store_row(grad_token, grad_stride, i, row, column, end, width, in_dim, results)
            above, here = here, below
    if parts is not None:
        _store_sums(parts, sums, dim, channel, in_dim)
