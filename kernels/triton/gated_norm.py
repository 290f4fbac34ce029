"""LayerNorm, optionally times the SiLU of a gate. A program handles whole tokens, so each is read once.

The backward pass recomputes the statistics. Each program loops over blocks of tokens and keeps one sum per channel for
the gradients of the weights, so that few partial sums remain.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import load_float
from .launch import PROGRAMS_PER_MULTIPROCESSOR, block, cdiv, kernel, multiprocessors, on_device_of_first

BLOCK_ELEMENTS = 2048  # tokens x channels per block, at least: 16 per thread, 8 in the backward pass
WARPS, BACKWARD_WARPS = 4, 8


@on_device_of_first
def gated_norm(y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(y) if gate is None else gate.new_empty(gate.shape)
    if out.numel():
        blocks, tokens, sizes = _blocks(y)
        stride = 0 if gate is None else gate.stride(2)
        _gated_norm[(blocks,)](y, gate, weight, bias, out, tokens, len(weight), stride, eps, **sizes, num_warps=WARPS)
    return out


@on_device_of_first
def gated_norm_backward(
    grad_out: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad_gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y = torch.empty_like(y)
    if not y.numel():
        return grad_y, torch.zeros_like(weight), torch.zeros_like(bias)
    blocks, tokens, sizes = _blocks(y)
    programs = min(blocks, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(y.device))
    parts = torch.empty(2, programs, len(weight), dtype=torch.float32, device=y.device)
    _gated_norm_backward[(programs,)](
        grad_out,
        y,
        gate,
        weight,
        bias,
        grad_y,
        grad_gate,
        parts,
        tokens,
        len(weight),
        0 if gate is None else gate.stride(2),
        0 if grad_gate is None else grad_gate.stride(2),
        eps,
        **sizes,
        num_warps=BACKWARD_WARPS,
    )
    grad_weight, grad_bias = (part.sum(0) for part in parts)
    return grad_y, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _blocks(y: Tensor) -> tuple[int, int, dict[str, Any]]:
    """The numbers of blocks and of tokens, and the block sizes."""
    dim = y.shape[-1]
    tokens = y.numel() // dim
    block_dim = block(dim, 1 << 30)
    block_tokens = block(tokens, max(BLOCK_ELEMENTS // block_dim, 1))
    return cdiv(tokens, block_tokens), tokens, dict(BLOCK_TOKENS=block_tokens, BLOCK_DIM=block_dim)


@triton.jit
def _normalise(y, dim, eps, in_dim) -> tuple[tl.tensor, tl.tensor]:
    """Tokens with mean 0 and variance 1, and 0 beyond the channels; and 1 / standard deviation, (tokens, 1)."""
    mean = tl.sum(y, axis=1) / dim
    centred = tl.where(in_dim[None, :], y - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    return centred * scale[:, None], scale[:, None]


@kernel
def _gated_norm(
    y,
    gate,
    weight,
    bias,
    out,
    tokens,
    dim,
    stride,
    eps,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    channel = tl.arange(0, BLOCK_DIM)
    in_dim = channel < dim
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask = (token < tokens)[:, None] & in_dim[None, :]
    place = token[:, None] * dim + channel[None, :]
    if gate is not None:
        gate_ = load_float(gate + token[:, None] * stride + channel[None, :], mask)
    normed, _ = _normalise(load_float(y + place, mask), dim, eps, in_dim)
    result = normed * load_float(weight + channel, in_dim)[None, :] + load_float(bias + channel, in_dim)[None, :]
    if gate is not None:
        result = result * gate_ * tl.sigmoid(gate_)
    tl.store(out + place, result, mask=mask)


@kernel
def _gated_norm_backward(
    grad_out,
    y,
    gate,
    weight,
    bias,
    grad_y,
    grad_gate,
    parts,
    tokens,
    dim,
    stride,
    grad_stride,
    eps,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    channel = tl.arange(0, BLOCK_DIM)
    in_dim = channel < dim
    weight_ = load_float(weight + channel, in_dim)[None, :]
    bias_ = load_float(bias + channel, in_dim)[None, :]
    sum_weight = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    sum_bias = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_TOKENS, tokens, tl.num_programs(0) * BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        mask = (token < tokens)[:, None] & in_dim[None, :]
        place = token[:, None] * dim + channel[None, :]
        if gate is not None:
            gate_ = load_float(gate + token[:, None] * stride + channel[None, :], mask)
        grad = load_float(grad_out + place, mask)
        normed, scale = _normalise(load_float(y + place, mask), dim, eps, in_dim)
        if gate is not None:
            sigmoid = tl.sigmoid(gate_)
            grad_silu = grad * (normed * weight_ + bias_)
            grad_gate_ = grad_silu * sigmoid * (1.0 + gate_ * (1.0 - sigmoid))
            tl.store(grad_gate + token[:, None] * grad_stride + channel[None, :], grad_gate_, mask=mask)
            grad *= gate_ * sigmoid  # the gradient of the scaled and shifted token
        sum_weight += grad * normed
        sum_bias += grad
        grad *= weight_
        along_mean = tl.sum(grad, axis=1)[:, None] / dim
        along_token = tl.sum(grad * normed, axis=1)[:, None] / dim
        tl.store(grad_y + place, scale * (grad - along_mean - normed * along_token), mask=mask)
    place = tl.program_id(0) * dim + channel
    tl.store(parts + place, tl.sum(sum_weight, axis=0), mask=in_dim)
    tl.store(parts + tl.num_programs(0) * dim + place, tl.sum(sum_bias, axis=0), mask=in_dim)
