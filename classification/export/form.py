"""The form in which models are exported: the same function, in standard operations that run fast.

It has no operators of this package. Tokens stay channels-last except in convolutions, BatchNorms are folded into
convolutions, and the scan has at most a few hundred operations and no loop. A test compares the form with the reference
implementations.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.recurrence import scan_in_blocks
from ...kernels.state_fusion import repeat_edges
from ..models.inference_form import folded_conv, refuse_modified_parts
from ..models.operands import is_modified
from ..models.spatial_mamba import ConvLayer, PositionEncoding, SpatialMambaEncoder, StructureAwareSSM

# log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...). For s <= 1/3 six terms have a relative error below 2e-7.
ATANH_DENOMINATORS = (11, 9, 7, 5, 3, 1)


def export_form(model: SpatialMambaEncoder) -> SpatialMambaEncoder:
    """Copy the model, in float32 and on its device, with modules replaced by equivalents made of standard operations.

    Raises:
        RuntimeError: for a fused model, one in training mode, or one whose layers have hooks, or were wrapped, replaced
            or changed.
    """
    if model.fused:
        raise RuntimeError("a fused model cannot be exported: export the model as it was before fuse()")
    if model.training:
        raise RuntimeError("only a model in evaluation mode can be exported: call eval() first")
    refuse_modified_parts(model)
    model = deepcopy(model).float()
    _replace_children(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.requires_grad_(False)


def _replace_children(module: nn.Module) -> None:
    """Replace modules at any depth with their equivalents for export, in place."""
    for name, child in module.named_children():
        if isinstance(child, StructureAwareSSM):
            setattr(module, name, ExportedMixer(child))
        elif isinstance(child, PositionEncoding):
            setattr(module, name, ExportedPositionEncoding(child))
        elif isinstance(child, nn.Linear) and not is_modified(child, nn.Linear):
            setattr(module, name, Projection(child))
        elif isinstance(child, ConvLayer):
            child.conv, child.norm = folded_conv(child), nn.Identity()
        else:
            _replace_children(child)


class ExportedPositionEncoding(nn.Module):
    """``PositionEncoding`` for tokens (B, H, W, C)."""

    def __init__(self, conv: PositionEncoding) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        maps = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1, groups=x.shape[-1])
        return x + maps.permute(0, 2, 3, 1)


class Projection(nn.Module):
    """A linear layer whose weight is stored as (inputs, outputs), the form that quantisation expects.

    Args:
        linear: the layer.
        rows: the rows of its weight to use; all by default.
    """

    def __init__(self, linear: nn.Linear, rows: slice = slice(None)) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[rows].t().contiguous())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class ExportedMixer(nn.Module):
    """``StructureAwareSSM``, which has the equations: (B, H, W, C) to (B, H, W, C), with D = 2 C inner channels."""

    def __init__(self, ssm: StructureAwareSSM) -> None:
        super().__init__()
        self.inner_dim, self.dt_rank = ssm.inner_dim, ssm.dt_rank
        # Two products instead of one: splitting its result would copy.
        self.token_proj = Projection(ssm.in_proj, slice(ssm.inner_dim))
        self.gate_proj = Projection(ssm.in_proj, slice(ssm.inner_dim, None))
        self.conv = ssm.conv2d
        self.x_proj = nn.Parameter(ssm.x_proj_weight.detach().t().contiguous())  # (D, R + 2)
        self.dt_proj = nn.Parameter(ssm.dt_projs_weight.detach().t().contiguous())  # (R, D)
        self.dt_bias = ssm.dt_projs_bias
        self.A = nn.Parameter(-ssm.A_logs.detach().exp().squeeze(1))  # (D,)
        self.skip = ssm.Ds
        fusion = ssm.state_fusion
        self.dilations = fusion.dilations
        weights = () if fusion.alpha is None else fusion.alpha.detach()
        self.kernels = nn.ParameterList(
            weight * kernel.detach() for weight, kernel in zip(weights, fusion.kernels, strict=True)
        )
        self.out_norm = ssm.out_norm
        self.out_proj = Projection(ssm.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        maps = self.token_proj(x).permute(0, 3, 1, 2)
        convolved = F.conv2d(maps, self.conv.weight, self.conv.bias, padding=1, groups=self.inner_dim)
        u = F.silu(convolved).permute(0, 2, 3, 1)  # (B, H, W, D)
        r, B, C = (u @ self.x_proj).split([self.dt_rank, 1, 1], dim=-1)
        dt = softplus(r @ self.dt_proj + self.dt_bias)
        decays, inputs = torch.exp(dt * self.A), dt * u * B
        h = scan_in_blocks(decays.flatten(1, 2), inputs.flatten(1, 2)).unflatten(1, x.shape[1:3])
        y = C * self._fused(h) + self.skip * u
        return self.out_proj(self.out_norm(y) * F.silu(gate))

    def _fused(self, h: Tensor) -> Tensor:
        """State fusion of (B, H, W, D); the identity without kernels."""
        if not self.dilations:
            return h
        maps = [
            F.conv2d(
                repeat_edges(h, dilation * (kernel.shape[-1] // 2)).permute(0, 3, 1, 2),
                kernel,
                dilation=dilation,
                groups=self.inner_dim,
            )
            for kernel, dilation in zip(self.kernels, self.dilations, strict=True)
        ]
        return sum(maps[1:], start=maps[0]).permute(0, 2, 3, 1)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` in float32, without overflow and accurate to the last bits even for tiny results.

    ``Softplus`` of ONNX Runtime takes several times as long and has an absolute error, which is 6e-5 of a delta of
    1e-3.
    """
    y = torch.exp(-x.abs())
    s = y / (y + 2)  # log(1 + y) = 2 artanh(s)
    square = s * s
    series = square * (1 / ATANH_DENOMINATORS[0]) + 1 / ATANH_DENOMINATORS[1]
    for denominator in ATANH_DENOMINATORS[2:]:
        series = series * square + 1 / denominator
    return F.relu(x) + 2 * s * series
