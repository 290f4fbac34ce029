"""Reads one state-space layer: the inputs of its scan for an image, and its states before and after fusion."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import selective_scan, state_fusion
from ...kernels.errors import UserError
from ..models import SpatialMamba


@dataclass(frozen=True)
class ScanLayer:
    """The inputs of the scan of one layer for one image of H x W = L tokens in row-major order; in float64 on the CPU.

    ``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y = C SASF(h)`` (arXiv 2410.15091, section 4.1) for D channels
    with one state each, without the skip connection.

    Attributes:
        u: (D, L), the tokens.
        delta: (D, L), positive.
        A: (D,), negative.
        B: (L,), the same for all channels.
        C: (L,), the same for all channels.
        kernels: the fusion kernels, each (D, 1, k, k); one 1x1 kernel of ones if the model has no fusion.
        alpha: one weight per kernel.
        dilations: one per kernel.
        height: H.
        width: W.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    kernels: tuple[Tensor, ...]
    alpha: Tensor
    dilations: tuple[int, ...]
    height: int
    width: int

    @property
    def channels(self) -> int:
        """D."""
        return len(self.A)

    def states(self) -> Tensor:
        """The states h of the scan, (D, H, W)."""
        h = selective_scan(self.u[None], self.delta[None], self.A[:, None], self.B[None, None])  # (1, D, 1, L)
        return h[0, :, 0].unflatten(1, (self.height, self.width))

    def fused_states(self) -> Tensor:
        """The fused states h', (D, H, W)."""
        return state_fusion(self.states()[None], self.kernels, self.alpha, self.dilations)[0]


def parse_layer(text: str | None, model: SpatialMamba, default_stage: int) -> tuple[int, int]:
    """Parse ``"STAGE.BLOCK"``, both from 0; None means the last block of a default stage.

    Raises:
        UserError: for a layer that the model does not have.
    """
    depths = [len(stage.blocks) for stage in model.layers]
    if text is None:
        stage = min(default_stage, len(depths) - 1)
        return stage, depths[stage] - 1
    if match := re.fullmatch(r"(\d+)\.(\d+)", text):
        stage, block = map(int, match.groups())
        if stage < len(depths) and block < depths[stage]:
            return stage, block
    last = ", ".join(f"{stage}.{depth - 1}" for stage, depth in enumerate(depths))
    raise UserError(f"--layer {text}: must be STAGE.BLOCK, both from 0; the last blocks of the stages are {last}")


def read_layer(model: SpatialMamba, image: Tensor, stage: int, block: int) -> ScanLayer:
    """Run the model on an image and record the inputs of the scan of one layer.

    Args:
        model: in evaluation mode, not fused.
        image: (1, 3, height, width), normalised.
        stage: from 0.
        block: of the stage, from 0.
    """
    ssm = model.layers[stage].blocks[block].self_attention
    received: list[Tensor] = []
    hook = ssm.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    try:
        with torch.no_grad():
            model(image)
    finally:
        hook.remove()
    (tokens,) = received  # (1, H, W, C)

    # As in the reference implementation of kernels.spatial_mixer, up to the scan.
    with torch.no_grad():
        x, _ = ssm.in_proj(tokens).chunk(2, dim=-1)  # (1, H, W, D)
        u = ssm.conv2d(x)
        r, B, C = _exact(F.linear(u, ssm.x_proj_weight)).split([ssm.dt_rank, 1, 1], dim=-1)
        dt_weight, dt_bias, A_log = map(_exact, (ssm.dt_projs_weight, ssm.dt_projs_bias, ssm.A_logs))
        delta = F.softplus(F.linear(r, dt_weight, dt_bias))  # (1, H, W, D)
        kernels, alpha, dilations = ssm.state_fusion.branches(ssm.Ds)
        return ScanLayer(
            u=_exact(u).flatten(0, 2).T.contiguous(),
            delta=delta.flatten(0, 2).T.contiguous(),
            A=-torch.exp(A_log.squeeze(1)),
            B=B.flatten(),
            C=C.flatten(),
            kernels=tuple(map(_exact, kernels)),
            alpha=_exact(alpha),
            dilations=tuple(dilations),
            height=tokens.shape[1],
            width=tokens.shape[2],
        )


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def fusion_change(before: Tensor, after: Tensor) -> Tensor:
    """How much fusion changes the pattern of each channel: 1 minus the spatial correlation of h and h'.

    It is 0 if fusion only scales and shifts a map, which includes constant maps.

    Args:
        before: (D, H, W).
        after: (D, H, W).

    Returns:
        (D,), from 0 to 2.
    """
    correlation = (standardised(before) * standardised(after)).mean(dim=(1, 2))
    constant = (_spread(before) == 0) | (_spread(after) == 0)
    return torch.where(constant, 0.0, 1 - correlation)


def most_changed(change: Tensor, count: int) -> Sequence[int]:
    """The channels that change most, in decreasing order; all channels if there are fewer than ``count``."""
    return change.topk(min(count, len(change))).indices.tolist()


def standardised(maps: Tensor) -> Tensor:
    """Subtract the mean of each map of (D, H, W) and divide by its standard deviation; constant maps become 0."""
    spread = _spread(maps)
    spread = torch.where(spread == 0, 1.0, spread)
    return (maps - maps.mean(dim=(1, 2), keepdim=True)) / spread[:, None, None]


def _spread(maps: Tensor) -> Tensor:
    return maps.flatten(1).std(dim=1, correction=0)
