"""The form in which models are exported: the same function in plain operations that runtimes execute well.

No operator of this package is left in it, tokens stay channels-last wherever they are not convolved, and the scan is
a few hundred operations at most, without a loop. BatchNorms are folded into convolutions. A test holds it to the
reference implementations.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.recurrence import scan_in_blocks
from ...kernels.state_fusion import repeat_edges
from ..models.spatial_mamba import (
    ConvLayer,
    DepthwiseConv,
    SpatialMambaEncoder,
    StructureAwareSSM,
    refuse_modified_parts,
)

# log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...); for s up to 1/3 these six leave out less than 2e-7 of it.
ATANH_DENOMINATORS = (11, 9, 7, 5, 3, 1)


def export_form(model: SpatialMambaEncoder) -> SpatialMambaEncoder:
    """A copy of the model, in float32 and on its device, that computes the same in operations fit for export.

    Raises:
        RuntimeError: for a fused model, one in training mode, or one with hooks or wrappers on its layers.
    """
    if model.fused:
        raise RuntimeError("a fused model cannot be exported: export the model as it was before fuse()")
    refuse_modified_parts(model)
    if model.training:
        raise RuntimeError("only a model in evaluation mode can be exported: call eval() first")
    model = _exchanged(deepcopy(model).float())
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.requires_grad_(False)


def _exchanged(module: nn.Module) -> nn.Module:
    """The module, or what takes its place; the same inside it."""
    if isinstance(module, StructureAwareSSM):
        return ExportedMixer(module)
    if isinstance(module, DepthwiseConv):
        return PositionEncoding(module)
    if isinstance(module, nn.Linear):
        return Projection(module)
    if isinstance(module, ConvLayer):
        module.conv, module.norm = module.folded(), nn.Identity()
        return module
    for name, child in module.named_children():
        setattr(module, name, _exchanged(child))
    return module


class PositionEncoding(nn.Module):
    """``DepthwiseConv``, (B, H, W, C) to the same: the convolution's result is added to its input."""

    def __init__(self, conv: DepthwiseConv) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        maps = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1, groups=x.shape[-1])
        return x + maps.permute(0, 2, 3, 1)


class Projection(nn.Module):
    """A linear layer whose weight lies in the file as it is multiplied, (inputs, outputs): it can be quantised there.

    Args:
        linear: the layer, or some rows of its weight.
        rows: of the weight that are taken; all by default.
    """

    def __init__(self, linear: nn.Linear, rows: slice = slice(None)) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[rows].t().contiguous())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[rows].clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class ExportedMixer(nn.Module):
    """``StructureAwareSSM``, (B, H, W, C) to (B, H, W, C), see there for the equations; D = 2 C channels inside."""

    def __init__(self, ssm: StructureAwareSSM) -> None:
        super().__init__()
        self.inner_dim, self.dt_rank = ssm.inner_dim, ssm.dt_rank
        # Two products in place of one that is cut in halves: cutting copies.
        self.token_proj = Projection(ssm.in_proj, slice(ssm.inner_dim))
        self.gate_proj = Projection(ssm.in_proj, slice(ssm.inner_dim, None))
        self.conv = ssm.conv2d
        self.x_proj = nn.Parameter(ssm.x_proj_weight.detach().t().contiguous())  # (D, R + 2)
        self.step_proj = nn.Parameter(ssm.dt_projs_weight.detach().t().contiguous())  # (R, D)
        self.step_bias = ssm.dt_projs_bias
        self.rate = nn.Parameter(-ssm.A_logs.detach().exp().squeeze(1))  # (D,)
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
        low_rank_step, B, C = (u @ self.x_proj).split([self.dt_rank, 1, 1], dim=-1)
        step = softplus(low_rank_step @ self.step_proj + self.step_bias)
        decays, inputs = torch.exp(step * self.rate), step * u * B
        h = scan_in_blocks(decays.flatten(1, 2), inputs.flatten(1, 2)).unflatten(1, x.shape[1:3])
        y = C * self._fused(h) + self.skip * u
        return self.out_proj(self.out_norm(y) * F.silu(gate))

    def _fused(self, h: Tensor) -> Tensor:
        """State fusion of (B, H, W, D); without kernels the states themselves."""
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
    """``log(1 + exp(x))`` in float32, to the last bits for tiny results too, and never infinite.

    ONNX Runtime takes several times as long for ``Softplus``, and its error is absolute: with steps of 1e-3 that is
    6e-5 of them.
    """
    y = torch.exp(-x.abs())
    s = y / (y + 2)  # log(1 + y) = 2 artanh(s)
    square = s * s
    series = square * (1 / ATANH_DENOMINATORS[0]) + 1 / ATANH_DENOMINATORS[1]
    for denominator in ATANH_DENOMINATORS[2:]:
        series = series * square + 1 / denominator
    return F.relu(x) + 2 * s * series
