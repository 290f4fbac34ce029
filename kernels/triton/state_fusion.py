"""State fusion, which gathers neighbours at clamped positions, and its adjoint, also a gather.

``structure_aware_scan`` uses the same kernels. It multiplies the fused states by C and adds D u: if ``projection`` is
given, C is its last channel, and the gradient of the fused states is ``grad_out C``.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import channel_block, load_float
from .launch import block, cdiv, kernel, on_device_of_first

TILE_ELEMENTS = 4096  # per program that gathers: 8 per thread
TILE_WARPS = 16
STRIP_WARPS = 8
STRIP_WIDTH, PART_CHANNELS = 8, 64  # 4 elements per thread: the sums of all taps fit in registers


@on_device_of_first
def state_fusion(h: Tensor, taps: Tensor, offsets: Sequence[int]) -> Tensor:
    out = torch.empty_like(h)
    launch_fuse(h, taps, offsets, out)
    return out


@on_device_of_first
def state_fusion_backward(grad_out: Tensor, h: Tensor, taps: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    grad_h = torch.empty_like(h)
    launch_fuse_adjoint(grad_out, taps, offsets, grad_h)
    return grad_h, launch_tap_gradients(grad_out, h, taps, offsets)


def launch_fuse(
    h: Tensor,
    taps: Tensor,
    offsets: Sequence[int],
    out: Tensor,
    u: Tensor | None = None,
    projection: Tensor | None = None,
    D: Tensor | None = None,
) -> None:
    """Write the fused states, or ``C fused + D u`` if these are given, to ``out``, (batch, H, W, dim)."""
    grid, blocks = _tiles(h)
    if h.numel():
        _fuse[grid](h, taps, out, u, projection, D, *h.shape[1:], _channels(projection), tuple(offsets), **blocks)


def launch_fuse_adjoint(
    grad_out: Tensor, taps: Tensor, offsets: Sequence[int], grad_h: Tensor, projection: Tensor | None = None
) -> None:
    """Write the gradient of the states to ``grad_h``, (batch, H, W, dim)."""
    if not grad_h.numel():
        return
    arguments = (grad_out, taps, grad_h, projection, *grad_h.shape[1:], _channels(projection))
    grid, blocks = _tiles(grad_h)
    _fuse_adjoint_interior[grid](*arguments, tuple(offsets), **blocks)

    batch, height, width, dim = grad_h.shape
    block_pixels, block_dim = block(max(height, width), 32), block(dim, 64)
    longest = max(height - 2, width - 2, 1)
    grid = (batch * 8 * cdiv(longest, block_pixels), cdiv(dim, block_dim))
    _fuse_adjoint_border[grid](
        *arguments,
        _as_tensor(tuple(offsets), grad_h.device),
        len(taps),
        BLOCK_PIXELS=block_pixels,
        BLOCK_DIM=block_dim,
    )


def launch_tap_gradients(
    grad_out: Tensor,
    h: Tensor,
    taps: Tensor,
    offsets: Sequence[int],
    projection: Tensor | None = None,
    grad_projections: Tensor | None = None,
) -> Tensor:
    """The gradient of the taps, (T, dim).

    If ``grad_projections`` is given, (channel blocks of ``PART_CHANNELS``, batch, H, W, R + 2), the gradient of C is
    written to its last channel, one partial sum per block.
    """
    batch, _, width, dim = h.shape
    block_width, block_dim = block(width, STRIP_WIDTH), block(dim, PART_CHANNELS)
    strips = cdiv(width, block_width)
    parts = taps.new_empty(batch * strips, *taps.shape)
    if h.numel():
        _tap_gradients[batch * strips, cdiv(dim, block_dim)](
            grad_out,
            h,
            taps,
            parts,
            projection,
            grad_projections,
            batch,
            *h.shape[1:],
            _channels(projection),
            tuple(offsets),
            BLOCK_WIDTH=block_width,
            BLOCK_DIM=block_dim,
            num_warps=STRIP_WARPS,
        )
    return parts.sum(0)


@lru_cache(maxsize=32)
def _as_tensor(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, because a copy to the GPU would synchronise with it in each call."""
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def _channels(projection: Tensor | None) -> int:
    return 0 if projection is None else projection.shape[-1]


def _tiles(h: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block sizes: tiles of the image, so that neighbours hit the L1 cache, times blocks of channels."""
    batch, height, width, dim = h.shape
    block_height, block_width = (min((16, 8), key=lambda side: -(-size // side) * side) for size in (height, width))
    block_height, block_width = min(block_height, block(height, 16)), min(block_width, block(width, 16))
    block_dim = block(dim, TILE_ELEMENTS // (block_height * block_width))
    tiles = cdiv(height, block_height) * cdiv(width, block_width)
    blocks = dict(BLOCK_HEIGHT=block_height, BLOCK_WIDTH=block_width, BLOCK_DIM=block_dim, num_warps=TILE_WARPS)
    return (batch * tiles, cdiv(dim, block_dim)), blocks


# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    height, width, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first token of this program's image, and the rows and columns of its tile."""
    across = tl.cdiv(width, BLOCK_WIDTH)
    tiles = across * tl.cdiv(height, BLOCK_HEIGHT)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = tl.arange(0, BLOCK_HEIGHT * BLOCK_WIDTH)
    row = tile // across * BLOCK_HEIGHT + pixel // BLOCK_WIDTH
    column = tile % across * BLOCK_WIDTH + pixel % BLOCK_WIDTH
    return image.to(tl.int64) * height * width, row, column


@triton.jit
def _clamp(index, size) -> tl.tensor:
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def _load_grad_fused(grad_out, projection, token, inside, channel, in_dim, dim, projection_channels) -> tl.tensor:
    """Gradient of the fused states of some tokens: ``grad_out``, times C if ``projection`` is given; 0 outside."""
    grad = load_float(grad_out + token[:, None] * dim + channel[None, :], inside[:, None] & in_dim[None, :])
    if projection is not None:
        C = load_float(projection + token * projection_channels + projection_channels - 1, inside)
        grad *= C[:, None]
    return grad


@triton.jit
def _preimage(index, offset, size) -> tuple[tl.tensor, tl.tensor]:
    """The first and last positions j on an axis with ``clamp(j + offset) == index``."""
    first = tl.where(index == 0, 0, tl.maximum(index - offset, 0))
    last = tl.where(index == size - 1, size - 1, tl.minimum(index - offset, size - 1))
    return first, last


@triton.jit
def _region(which, size) -> tuple[tl.tensor, tl.tensor]:
    """Start and length of the first (0), inner (1) or last (2) part of an axis; the edge parts have one position."""
    start = tl.where(which == 0, 0, tl.where(which == 1, 1, size - 1))
    length = tl.where(which == 0, 1, tl.where(which == 1, tl.maximum(size - 2, 0), tl.minimum(size - 1, 1)))
    return start, length


# --- Kernels; OFFSETS are T pairs of row and column -------------------------------------------------------------------


@kernel
def _fuse(
    h,
    taps,
    out,
    u,
    projection,
    D,
    height,
    width,
    dim,
    projection_channels,
    OFFSETS: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    first, row, column = _tile(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)
    inside = (row < height) & (column < width)
    mask = inside[:, None] & in_dim[None, :]

    fused = tl.zeros((BLOCK_HEIGHT * BLOCK_WIDTH, BLOCK_DIM), tl.float32)
    for k in tl.static_range(len(OFFSETS) // 2):
        neighbour_row = _clamp(row + OFFSETS[2 * k], height)
        neighbour = first + neighbour_row * width + _clamp(column + OFFSETS[2 * k + 1], width)
        tap = load_float(taps + k * dim + channel, in_dim)
        fused += tap[None, :] * load_float(h + neighbour[:, None] * dim + channel[None, :], mask)

    token = first + row * width + column
    place = token[:, None] * dim + channel[None, :]
    if projection is not None:
        C = load_float(projection + token * projection_channels + projection_channels - 1, inside)
        fused = C[:, None] * fused + load_float(D + channel, in_dim)[None, :] * load_float(u + place, mask)
    tl.store(out + place, fused, mask=mask)


@kernel
def _fuse_adjoint_interior(
    grad_out,
    taps,
    grad_h,
    projection,
    height,
    width,
    dim,
    projection_channels,
    OFFSETS: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """States inside the border, each read by at most one position per tap."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    first, row, column = _tile(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)

    total = tl.zeros((BLOCK_HEIGHT * BLOCK_WIDTH, BLOCK_DIM), tl.float32)
    for k in tl.static_range(len(OFFSETS) // 2):
        reader_row, reader_column = row - OFFSETS[2 * k], column - OFFSETS[2 * k + 1]
        inside = (reader_row >= 0) & (reader_row < height) & (reader_column >= 0) & (reader_column < width)
        reader = first + reader_row * width + reader_column
        tap = load_float(taps + k * dim + channel, in_dim)
        total += tap[None, :] * _load_grad_fused(
            grad_out, projection, reader, inside, channel, in_dim, dim, projection_channels
        )

    interior = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    place = (first + row * width + column)[:, None] * dim + channel[None, :]
    tl.store(grad_h + place, total, mask=interior[:, None] & in_dim[None, :])


@kernel
def _fuse_adjoint_border(
    grad_out,
    taps,
    grad_h,
    projection,
    height,
    width,
    dim,
    projection_channels,
    offsets,
    offset_pairs,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """States on the border, which the padding repeats: read by several positions per tap.

    A program handles pixels of one of the four corners or four edges, which have similar numbers of readers. The loops
    are not unrolled: for so few pixels, that would cost more in compilation than it saves.
    """
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    blocks = tl.cdiv(tl.maximum(tl.maximum(height, width) - 2, 1), BLOCK_PIXELS)
    image, place_in_image = tl.program_id(0) // (8 * blocks), tl.program_id(0) % (8 * blocks)
    region = place_in_image // blocks
    region += (region >= 4).to(tl.int32)  # the middle one of the 3 x 3 regions is the interior
    row_start, rows = _region(region // 3, height)
    column_start, columns = _region(region % 3, width)
    first = image.to(tl.int64) * height * width

    start = place_in_image % blocks * BLOCK_PIXELS
    if start >= rows * columns:  # the grid has as many blocks as the longest edge needs
        return
    pixel = start + tl.arange(0, BLOCK_PIXELS)
    in_region = pixel < rows * columns
    row, column = row_start + pixel // columns, column_start + pixel % columns

    total = tl.zeros((BLOCK_PIXELS, BLOCK_DIM), tl.float32)
    for k in range(offset_pairs):
        first_row, last_row = _preimage(row, tl.load(offsets + 2 * k), height)
        first_column, last_column = _preimage(column, tl.load(offsets + 2 * k + 1), width)
        tap = load_float(taps + k * dim + channel, in_dim)
        reader_rows = tl.max(tl.where(in_region, last_row - first_row + 1, 0), 0)
        reader_columns = tl.max(tl.where(in_region, last_column - first_column + 1, 0), 0)
        for i in range(reader_rows * reader_columns):
            reader_row, reader_column = first_row + i // reader_columns, first_column + i % reader_columns
            inside = in_region & (reader_row <= last_row) & (reader_column <= last_column)
            reader = first + reader_row * width + reader_column
            total += tap[None, :] * _load_grad_fused(
                grad_out, projection, reader, inside, channel, in_dim, dim, projection_channels
            )

    place = (first + row * width + column)[:, None] * dim + channel[None, :]
    tl.store(grad_h + place, total, mask=in_region[:, None] & in_dim[None, :])


@kernel
def _tap_gradients(
    grad_out,
    h,
    taps,
    parts,
    projection,
    grad_projections,
    batch,
    height,
    width,
    dim,
    projection_channels,
    OFFSETS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """Move down a strip of the image, whose rows stay in the L1 cache, with one sum per tap."""
    channel, in_dim = channel_block(dim, BLOCK_DIM)
    strips = tl.cdiv(width, BLOCK_WIDTH)
    image, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    column = strip * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    mask = inside[:, None] & in_dim[None, :]
    first = image.to(tl.int64) * height * width

    sums = ()
    for _ in tl.static_range(len(OFFSETS) // 2):
        sums += (tl.zeros((BLOCK_WIDTH, BLOCK_DIM), tl.float32),)
    for row in range(height):
        token = first + row * width + column
        grad_fused = _load_grad_fused(grad_out, projection, token, inside, channel, in_dim, dim, projection_channels)
        fused = tl.zeros((BLOCK_WIDTH, BLOCK_DIM), tl.float32)
        new_sums = ()
        for k in tl.static_range(len(OFFSETS) // 2):
            neighbour_row = _clamp(row + OFFSETS[2 * k], height)
            neighbour = first + neighbour_row * width + _clamp(column + OFFSETS[2 * k + 1], width)
            state = load_float(h + neighbour[:, None] * dim + channel[None, :], mask)
            new_sums += (sums[k] + grad_fused * state,)
            if grad_projections is not None:
                fused += load_float(taps + k * dim + channel, in_dim)[None, :] * state
        sums = new_sums
        if grad_projections is not None:
            grad = load_float(grad_out + token[:, None] * dim + channel[None, :], mask)
            part = tl.program_id(1).to(tl.int64) * batch * height * width + token
            grad_C = tl.sum(grad * fused, axis=1)
            tl.store(grad_projections + (part + 1) * projection_channels - 1, grad_C, mask=inside)

    for k in tl.static_range(len(OFFSETS) // 2):
        place = (tl.program_id(0).to(tl.int64) * (len(OFFSETS) // 2) + k) * dim + channel
        tl.store(parts + place, tl.sum(sums[k], axis=0), mask=in_dim)
