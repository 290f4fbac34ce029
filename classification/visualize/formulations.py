"""Linear attention, Mamba and Spatial-Mamba as one product y = M u (arXiv 2410.15091), from one layer's parameters.

For token i, token j and a channel, with ``h_t = sum_j G_tj u_j`` the states of the scan:

- linear attention: ``M_ij = C_i B_j`` for j <= i;
- Mamba: ``M_ij = C_i G_ij`` with ``G_ij = (prod_(k=j+1..i) exp(delta_k A)) delta_j B_j`` for j <= i;
- Spatial-Mamba: ``M_ij = C_i sum_n w_n G_(n(i))j`` over the neighbours n(i) of token i that the fusion reads, with the
  weight w_n of each; outside the map they are the nearest token inside it.

The skip connection, ``y += D u``, is the same in the last two and is left out. The first two are this layer without
decay and delta, and without fusion; no model was trained that way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.state_fusion import merge_taps, tap_offsets
from .layers import ScanLayer

LINEAR_ATTENTION, MAMBA, SPATIAL_MAMBA = FORMULATIONS = ("linear attention", "Mamba", "Spatial-Mamba")


def matrix_row(layer: ScanLayer, formulation: str, row: int, column: int) -> Tensor:
    """The exact contribution of every token to the token at a row and column of the map: one row of M per channel.

    No intermediate is larger than the result.

    Returns:
        (D, L), in row-major order.
    """
    query = row * layer.width + column
    if formulation == LINEAR_ATTENTION:
        earlier = torch.arange(layer.B.numel()) <= query
        weights = (layer.B * earlier).expand(layer.channels, -1)
    elif formulation == MAMBA:
        weights = _state_row(layer, query)
    else:
        weights = torch.zeros_like(layer.u)
        for (down, right), tap in _taps(layer):
            nearest_row = min(max(row + down, 0), layer.height - 1)
            nearest_column = min(max(column + right, 0), layer.width - 1)
            weights += tap[:, None] * _state_row(layer, nearest_row * layer.width + nearest_column)
    return layer.C[query] * weights


def activation(layer: ScanLayer, formulation: str) -> Tensor:
    """``y = M u`` for all tokens, (D, H, W), in linear time."""
    size = (layer.height, layer.width)
    if formulation == LINEAR_ATTENTION:
        read = (layer.B * layer.u).cumsum(dim=1).unflatten(1, size)
    else:
        read = layer.states() if formulation == MAMBA else layer.fused_states()
    return layer.C.unflatten(0, size) * read


def magnitude(values: Tensor) -> Tensor:
    """Mean over the channels, the first axis, of the absolute values."""
    return values.abs().mean(dim=0)


def _state_row(layer: ScanLayer, token: int) -> Tensor:
    """The weights of all tokens in the states at one token, a row of G: (D, L)."""
    delta = layer.delta[:, : token + 1]
    # The product of decays is the exponential of a sum. In float64, the difference of two running sums is accurate.
    since = delta.cumsum(dim=1)
    since = since[:, -1:] - since  # sum of delta after each token
    row = torch.zeros_like(layer.u)
    row[:, : token + 1] = torch.exp(since * layer.A[:, None]) * delta * layer.B[: token + 1]
    return row


def _taps(layer: ScanLayer) -> Sequence[tuple[tuple[int, int], Tensor]]:
    """The distinct neighbours that fusion reads, as (rows down, columns right), and their weights (D,)."""
    offsets = tap_offsets([kernel.shape[-1] for kernel in layer.kernels], layer.dilations)
    taps = merge_taps(layer.kernels, layer.alpha, layer.dilations)
    return list(zip(zip(offsets[::2], offsets[1::2], strict=True), taps, strict=True))
