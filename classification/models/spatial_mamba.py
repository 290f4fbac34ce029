"""Spatial-Mamba (arXiv 2410.15091): the backbone, the ImageNet classifier and their registration with timm.

Tokens are kept as (B, H, W, C). Convolutions see them through a channels-last (B, C, H, W) view, so changing the
layout copies nothing. `inference_form` converts a model for inference.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from ...kernels import depthwise_conv, downsampling, layer_norm, mlp, selective_scan, spatial_mixer, state_fusion
from ...kernels.backends import has_kernels
from ...kernels.state_fusion import check_dilations
from ...kernels.tensors import compute_dtype_for, without_autocast
from .architecture import FIRST_CONV, PUBLISHED_KERNELS, VARIANTS, describe_other_architecture
from .hub import HubModule
from .operands import as_operand, has_modified_parts, is_downsampling, is_modified, is_pointwise
from .preprocessing import CROP_FRACTION, NORMALISATION, SMALLEST_SIZE
from .recomputation import checkpointed, recomputed
from .stand_ins import allow_permanently, config_types
from .weights import (
    CLASSIFIER_ONLY,
    WeightsError,
    describe_misfit,
    encoder_weights,
    load_backbone_weights,
    model_weights,
    plain_names,
    under_own_names,
)

__all__ = [
    "SpatialMamba",
    "SpatialMambaBackbone",
    "spatial_mamba_base",
    "spatial_mamba_small",
    "spatial_mamba_tiny",
]

LAYER_NORM_EPS = 1e-5
FUSION_DILATIONS = tuple(dilation for dilation, _ in PUBLISHED_KERNELS.values())
FUSION_KERNEL_SIZE = 3

# Leaves for torch.fx: their checks of shapes, devices and dtypes cannot be traced.
torch.fx.wrap("checked_images")
torch.fx.wrap("depthwise_conv")
torch.fx.wrap("layer_norm")
torch.fx.wrap("selective_scan")
torch.fx.wrap("spatial_mixer")
torch.fx.wrap("state_fusion")


class ConvLayer(nn.Module):
    """Convolution padded by half its kernel, then optional BatchNorm and ReLU; (B, C, H, W)."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        act: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_chans) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def checked_images(x: Tensor, in_chans: int, weight: Tensor) -> Tensor:
    """Return ``x`` if it is (B, in_chans, H, W) and has the dtype of ``weight``, or one that autocast converts.

    Raises:
        ValueError: for any other shape.
        TypeError: for any other type or dtype.
    """
    if torch.jit.is_tracing():  # the checks would become part of the graph
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a tensor, got {type(x).__name__}: convert them with torch.as_tensor")
    if x.ndim != 4 or x.shape[1] != in_chans:
        if x.ndim == 3 and x.shape[0] == in_chans:
            remedy = "add a batch dimension with images[None]"
        elif x.ndim == 4 and x.shape[3] == in_chans:
            remedy = "move the channels with images.permute(0, 3, 1, 2)"
        elif x.ndim == 4:
            remedy = f"convert the images, or build the model with in_chans={x.shape[1]}"
        else:
            remedy = "give one batch of images at a time"
        raise ValueError(f"images must have shape (B, {in_chans}, H, W), got {tuple(x.shape)}: {remedy}")
    if x.dtype != weight.dtype and not _autocast_converts(x, weight):
        remedy = f"call images.to({weight.dtype}) or model.to({x.dtype})"
        if not x.dtype.is_floating_point:
            remedy = f"call images.to({weight.dtype}) / 255 for 8-bit images, and normalise them as in training"
        raise TypeError(f"images are {x.dtype}, but the weights are {weight.dtype}: {remedy}")
    return x


def _autocast_converts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast is on and reconciles two different dtypes: it handles floating-point types except float64."""
    dtypes = (x.dtype, weight.dtype)
    if torch.float64 in dtypes or not all(dtype.is_floating_point for dtype in dtypes):
        return False
    return torch.is_autocast_enabled(x.device.type)


class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, ceil(H / 4), ceil(W / 4), dim)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_chans, dim // 2, 3, stride=2, bias=False, norm=True, act=True)
        self.conv2 = nn.Sequential(
            ConvLayer(dim // 2, dim // 2, 3, bias=False, norm=True, act=True),
            ConvLayer(dim // 2, dim // 2, 3, bias=False, norm=True),
        )
        self.conv3 = nn.Sequential(
            ConvLayer(dim // 2, 4 * dim, 3, stride=2, bias=False, norm=True, act=True),
            ConvLayer(4 * dim, dim, bias=False, norm=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv1.conv
        if isinstance(conv, nn.Conv2d):  # an adapter may have replaced it
            x = checked_images(x, conv.in_channels, conv.weight)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels-last, in a form that vmap supports
        x = self.conv1(x)
        x = x + self.conv2(x)
        return self.conv3(x).permute(0, 2, 3, 1)


class Reduction(ConvLayer):
    """ReLU, depthwise 3x3 convolution of stride 2, ReLU: (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, stride=2, groups=dim, act=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


class InvertedBottleneck(nn.Sequential):
    """Three layers, of which the first expands the maps (B, C, H, W). The expanded maps are not stored for training.

    One operator computes everything except the last norm where it has kernels, unless weights are frozen. If one of the
    layers has hooks or parametrisations, or is wrapped, sharded or replaced in part, the layers are called without
    recomputation.
    """

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self
        expand, reduce, project = layers
        plain = _is_plain_conv(expand, ConvLayer, norm=nn.Identity, act=nn.Identity)
        if not (plain and _is_plain_conv(reduce, Reduction, norm=nn.Identity, act=nn.ReLU)):
            return project(reduce(expand(x)))
        if has_kernels("downsampling", x) and _is_plain_conv(project, ConvLayer, act=nn.Identity):
            maps = _downsample(expand.conv, reduce.conv, project.conv, x)
            if maps is not None:
                return project.norm(maps)
        return project(checkpointed(expand, reduce, x))


def _downsample(expand: nn.Conv2d, reduce: nn.Conv2d, project: nn.Conv2d, x: Tensor) -> Tensor | None:
    """The three convolutions as one operator, which rectifies the maps in between; None if it cannot compute them."""
    if not (is_pointwise(expand) and is_downsampling(reduce) and is_pointwise(project)):
        return None
    to_hidden, from_hidden = expand.weight.flatten(1), project.weight.flatten(1)
    weights: Any = (to_hidden, expand.bias, reduce.weight, reduce.bias, from_hidden, project.bias)
    tokens = as_operand(x.permute(0, 2, 3, 1), *weights)
    return None if tokens is None else downsampling(tokens, *weights).permute(0, 3, 1, 2)


def _is_plain_conv(layer: Any, kind: type[ConvLayer], **parts: type[nn.Module]) -> bool:
    """Whether the layer and these parts are of these types and unmodified, and the convolution has its own weights."""
    parts["conv"] = nn.Conv2d
    return not (is_modified(layer, kind) or has_modified_parts(layer, parts) or is_parametrized(layer.conv))


class Downsample(nn.Module):
    """Tokens (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C), through an inverted bottleneck."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = InvertedBottleneck(
            ConvLayer(dim, 8 * dim),
            Reduction(8 * dim),
            ConvLayer(8 * dim, 2 * dim, norm=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution of tokens (B, H, W, C) with zero padding, then SiLU.

    Padding and dilation may be changed later, for instance to circular padding for panoramas.
    """

    bias: nn.Parameter
    epilogue = "silu"  # see `depthwise_conv`

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    @property
    def is_standard(self) -> bool:
        """Whether `depthwise_conv` computes it."""
        return (self.padding, self.dilation, self.padding_mode) == ((1, 1), (1, 1), "zeros")

    def forward(self, x: Tensor) -> Tensor:
        if self.is_standard:
            return depthwise_conv(x, self.weight, self.bias, self.epilogue)
        out = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + out if self.epilogue == "residual" else F.silu(out)


class PositionEncoding(DepthwiseConv):
    """Conditional position encoding: tokens (B, H, W, C) plus their depthwise 3x3 convolution with zero padding."""

    epilogue = "residual"


class LayerNorm(nn.LayerNorm):
    """LayerNorm of tokens (..., C). On GPUs it keeps their dtype, also under autocast."""

    bias: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class ResidualSum(nn.Module):
    """``x + branch`` with stochastic depth: training drops the branch of random samples and scales up the others."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x + branch
        keep_prob = 1.0 - self.drop_prob
        scale = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep_prob)
        if keep_prob > 0.0:
            scale.div_(keep_prob)
        return torch.addcmul(x, branch, scale)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class StateFusion(nn.Module):
    """Structure-aware state fusion of states (B, dim, H, W): a weighted sum of dilated depthwise convolutions.

    Parameter names contain the size and dilation of each kernel, so weights of a different fusion never load by
    accident; 3x3 kernels with dilations 1, 3 and 5 have the published names. Without dilations there are no weights.

    Args:
        dim: channels of the states.
        dilations: one per kernel, ascending.
        kernel_sizes: one per kernel.
    """

    def __init__(self, dim: int, dilations: Sequence[int], kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.dilations = tuple(dilations)
        self.kernel_names = _fusion_kernel_names(dilations, kernel_sizes)
        for name, size in zip(self.kernel_names, kernel_sizes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.ones(dim, 1, size, size)))
        self.alpha = nn.Parameter(torch.ones(len(self.dilations))) if self.dilations else None

    @property
    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels, each (dim, 1, k, k), in the order of the dilations."""
        return tuple(getattr(self, name) for name in self.kernel_names)

    def branches(self, like: Tensor) -> tuple[tuple[Tensor, ...], Tensor, tuple[int, ...]]:
        """Kernels, alpha and dilations as the operators take them; without fusion, a single 1x1 identity kernel.

        The identity kernel takes its device and dtype from ``like``.
        """
        if self.alpha is not None:
            return self.kernels, self.alpha, self.dilations
        return (like.new_ones(self.dim, 1, 1, 1),), like.new_ones(1), (1,)

    def forward(self, h: Tensor) -> Tensor:
        return state_fusion(h, *self.branches(h))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dilations={self.dilations}"


def _fusion_kernel_names(dilations: Sequence[int], kernel_sizes: Sequence[int]) -> tuple[str, ...]:
    if (tuple(dilations), set(kernel_sizes)) == (FUSION_DILATIONS, {FUSION_KERNEL_SIZE}):
        return tuple(PUBLISHED_KERNELS)
    return tuple(f"kernel_{size}_dilation_{d}" for size, d in zip(kernel_sizes, dilations, strict=True))


class StructureAwareSSM(nn.Module):
    """Selective scan over the tokens in row-major order; its states are fused in 2-D before they are read out.

    ``h_t = exp(delta_t a) h_(t-1) + delta_t B_t u_t``, ``y = C SASF(h) + D u`` (paper, section 4.1), with a
    gate as in Mamba. Everything from delta to the gated output is float32 under autocast: fusion kernels start at 1,
    so fusion scales the states up to 27-fold, which half precision may not hold.

    One operator computes everything between the two projections. It reads the weights of ``conv2d``, ``state_fusion``
    and ``out_norm`` directly. If one of these modules has hooks or is wrapped, sharded or changed, the modules are
    called one by one instead.
    """

    def __init__(self, dim: int, fusion_dilations: Sequence[int], fusion_kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.inner_dim = inner_dim = 2 * dim
        self.dt_rank = dt_rank = math.ceil(dim / 16)

        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.conv2d = DepthwiseConv(inner_dim)
        self.x_proj_weight = nn.Parameter(torch.empty(dt_rank + 2, inner_dim))
        self.dt_projs_weight = nn.Parameter(torch.empty(inner_dim, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(inner_dim))
        self.A_logs = nn.Parameter(torch.zeros(inner_dim, 1))
        self.Ds = nn.Parameter(torch.ones(inner_dim))
        self.state_fusion = StateFusion(inner_dim, fusion_dilations, fusion_kernel_sizes)
        self.out_norm = LayerNorm(inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)
        self.reset_scan_parameters()

    def reset_scan_parameters(self) -> None:
        """Initialise the projections to B, C and delta; softplus(dt_projs_bias) is log-uniform in [1e-3, 1e-1]."""
        nn.init.kaiming_uniform_(self.x_proj_weight, a=math.sqrt(5))  # as nn.Linear does
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            dt = torch.exp(torch.rand(self.inner_dim) * math.log(1e-1 / 1e-3) + math.log(1e-3))
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj(x)  # (B, H, W, 2 D): tokens and gate
        plain = not has_modified_parts(self, MIXER_PARTS) and self.conv2d.is_standard
        y = self._mix(xz) if plain else self._mix_by_module(xz)
        return self.out_proj(y)

    def _mix(self, xz: Tensor) -> Tensor:
        kernels, alpha, dilations = self.state_fusion.branches(self.Ds)
        return spatial_mixer(
            xz,
            self.conv2d.weight,
            self.conv2d.bias,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs.squeeze(1),
            self.Ds,
            kernels,
            alpha,
            self.out_norm.weight,
            self.out_norm.bias,
            dilations,
            self.out_norm.eps,
        )

    def _mix_by_module(self, xz: Tensor) -> Tensor:
        x, gate = xz.chunk(2, dim=-1)
        u = self.conv2d(x)  # (B, H, W, D)
        projection = F.linear(u, self.x_proj_weight)
        compute_dtype = compute_dtype_for(xz)
        with without_autocast(xz):
            r, B, C = projection.to(compute_dtype).split([self.dt_rank, 1, 1], dim=-1)
            dt = F.linear(r, self.dt_projs_weight.to(compute_dtype))
            tokens, dt, B = (t.flatten(1, 2).transpose(1, 2) for t in (u.to(compute_dtype), dt, B))  # (B, channels, L)
            A = -torch.exp(self.A_logs.to(compute_dtype))
            h = selective_scan(tokens, dt, A, B, delta_bias=self.dt_projs_bias, delta_softplus=True)
            h = self.state_fusion(h.squeeze(2).unflatten(2, u.shape[1:3])).permute(0, 2, 3, 1)
            y = self.out_norm((C * h + self.Ds * u).to(self.out_norm.weight.dtype))
            return (y * F.silu(gate.to(compute_dtype))).to(xz.dtype)


# Modules that are not called: an operator reads their weights.
MIXER_PARTS: dict[str, type[nn.Module]] = {
    "conv2d": DepthwiseConv,
    "state_fusion": StateFusion,
    "out_norm": LayerNorm,
}


class Mlp(TimmMlp):
    """timm's MLP with the exact GELU, whose output is not stored for training.

    One operator computes it where it has kernels, unless weights are frozen or a part is hooked, wrapped, sharded or
    replaced.
    """

    def forward(self, x: Tensor) -> Tensor:
        if has_kernels("mlp", x) and self._is_plain():
            weights: list[Any] = [self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias]
            if (tokens := as_operand(x, *weights)) is not None:
                return mlp(tokens, *weights)
        x = self.fc1(x)
        activated = self.act(x)
        with recomputed(activated, self.act, x):
            x = self.fc2(self.norm(self.drop1(activated)))
        return self.drop2(x)

    def _is_plain(self) -> bool:
        """Whether the modules compute what `mlp` does, and nothing else."""
        if has_modified_parts(self, MLP_PARTS):
            return False
        return self.act.approximate == "none" and not (self.training and (self.drop1.p > 0.0 or self.drop2.p > 0.0))


MLP_PARTS: dict[str, type[nn.Module]] = {
    "fc1": nn.Linear,
    "act": nn.GELU,
    "drop1": nn.Dropout,
    "norm": nn.Identity,
    "fc2": nn.Linear,
    "drop2": nn.Dropout,
}


class Block(nn.Module):
    """Position encoding, state-space mixer, position encoding, MLP; all residual, tokens (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float,
        fusion_dilations: Sequence[int],
        fusion_kernel_sizes: Sequence[int],
    ) -> None:
        super().__init__()
        self.cpe1 = PositionEncoding(dim)
        self.ln_1 = LayerNorm(dim)
        self.self_attention = StructureAwareSSM(dim, fusion_dilations, fusion_kernel_sizes)
        self.cpe2 = PositionEncoding(dim)
        self.ln_2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.residual_sum = ResidualSum(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        normed = self.ln_1(x)
        with recomputed(normed, self.ln_1, x):
            branch = self.self_attention(normed)
        x = self.residual_sum(x, branch)
        x = self.cpe2(x)
        normed = self.ln_2(x)
        with recomputed(normed, self.ln_2, x):
            branch = self.mlp(normed)
        return self.residual_sum(x, branch)


class Stage(nn.Module):
    """Blocks of one width, then an optional downsampling; ``block_options`` are passed to ``Block``."""

    blocks: Any  # nn.ModuleList of Block, which PyTorch cannot express

    def __init__(self, dim: int, drop_paths: Sequence[float], downsample: bool, **block_options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, drop_path=drop_path, **block_options) for drop_path in drop_paths)
        self.downsample = Downsample(dim) if downsample else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, H, W, C) to the output of the blocks, (B, H, W, C), and the input of the next stage."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, self.downsample(x)


class SpatialMambaEncoder(HubModule):
    """Stem and stages, shared by the classifier and the backbone.

    Args:
        in_chans: channels of the images.
        dims: width of the first stage, an even number; it doubles from stage to stage.
        depths: number of blocks of each stage.
        d_state: states per channel; the model is defined for 1.
        mlp_ratio: hidden width of the MLPs, as a multiple of the width of their stage.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        use_checkpoint: recompute the blocks' activations in the backward pass instead of storing them.
        fusion_dilations: dilations of the fusion kernels, in any order; the published model has (1, 3, 5), and
            without any the model is a plain scan.
        fusion_kernel_sizes: odd sizes of these kernels: one for all, or one per dilation.

    Raises:
        ValueError: for a ``d_state`` other than 1, an odd width, a stage without blocks, an invalid rate or fusion.
    """

    layers: Any  # nn.ModuleList of Stage, which PyTorch cannot express

    def __init__(
        self,
        in_chans: int = 3,
        dims: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        use_checkpoint: bool = False,
        fusion_dilations: Sequence[int] = FUSION_DILATIONS,
        fusion_kernel_sizes: int | Sequence[int] = FUSION_KERNEL_SIZE,
    ) -> None:
        super().__init__()
        if d_state != 1:
            raise ValueError(f"Spatial-Mamba has one state per channel: d_state must be 1, got {d_state}")
        if isinstance(dims, Sequence) or dims < 2 or dims % 2:
            raise ValueError(f"dims, the width of the first stage, must be a positive even number, got {dims}")
        if isinstance(depths, int) or not len(depths) or min(depths) < 1:
            raise ValueError(f"depths must name at least one block for every stage, got {depths}")
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate must be in [0, 1], got {drop_path_rate}")
        block_options = dict(mlp_ratio=mlp_ratio) | _fusion_options(fusion_dilations, fusion_kernel_sizes)

        widths = [dims * 2**i for i in range(len(depths))]
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.patch_embed = Stem(in_chans, dims)
        self.layers = nn.ModuleList(
            Stage(width, drop_paths[i].tolist(), downsample=i < len(depths) - 1, **block_options)
            for i, width in enumerate(widths)
        )
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f"layers.{i}") for i, width in enumerate(widths)
        ]
        self.fused = False
        self.set_grad_checkpointing(use_checkpoint)
        self.apply(_init_weights)

    @torch.jit.ignore
    def fuse(self) -> "SpatialMambaEncoder":
        """Convert the model, in place and irreversibly, to its inference form; see `inference_form`.

        The model may be moved and cast before and after.

        Returns:
            The model itself.

        Raises:
            RuntimeError: in training mode, or if a module that will no longer be called has hooks, or was wrapped
                (LoRA, FSDP), replaced or changed.
        """
        from .inference_form import convert  # which imports this module

        if self.training:
            raise RuntimeError("only a model in evaluation mode can be fused: call eval() first")
        if not self.fused:
            convert(self)
        return self

    def train(self, mode: bool = True) -> "SpatialMambaEncoder":
        """Set training or evaluation mode.

        Raises:
            RuntimeError: if a fused model is set to training mode.
        """
        if mode and self.__dict__.get("fused"):
            raise RuntimeError(f"a fused {type(self).__name__} cannot be trained: build it again and load its weights")
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights like any module, and accept names with the prefixes of wrappers and training frameworks.

        Raises:
            WeightsError: if there are weights of several models.
            RuntimeError: if names or shapes do not match; one line if they belong to a different Spatial-Mamba.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            plain = encoder_weights(plain_names(state_dict, "state_dict"), "state_dict", whole=True)
            state_dict = under_own_names(own, plain)
        if strict and not self.fused and (problem := describe_other_architecture(own, state_dict)):
            raise RuntimeError(f"state_dict: {problem}")
        return super().load_state_dict(state_dict, strict, assign)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing of the blocks on or off."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No names: weight decay skips only biases and 1-D parameters, which timm excludes by itself."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters, ordered from input to output, for timm's layer-wise learning rates.

        A group is a block with the downsampling or final norm that follows it, or a stage if ``coarse``.
        """
        follows = (99999,)  # timm's number for "in the group before"
        stages = [(r"^layers\.(\d+)", None)]
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", follows)]
        norms = [(r"^outnorm(\d+)", follows), (r"^norm", follows)]
        return dict(stem=r"^patch_embed", blocks=[*(stages if coarse else blocks), *norms])


class SpatialMamba(SpatialMambaEncoder):
    """Spatial-Mamba classifier: images (B, in_chans, H, W) with H, W >= 32 to logits (B, num_classes).

    Args:
        num_classes: number of logits; 0 returns the pooled features instead.
        drop_rate: dropout before the classifier.
        global_pool: ``"avg"``, or ``""`` to classify every token.
        in_chans: see ``SpatialMambaEncoder``.
        **encoder_options: see ``SpatialMambaEncoder``.

    Raises:
        ValueError: for any other pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **encoder_options: Any,
    ) -> None:
        super().__init__(in_chans, **encoder_options)
        self.head_hidden_size = self.num_features
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.norm: nn.Module = LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a newly initialised one of another size, on the model's device and in its dtype.

        Raises:
            ValueError: for a pooling other than ``"avg"`` and ``""``.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f'global_pool must be "avg" or "", got {global_pool!r}')
            self.global_pool = global_pool
        self.num_classes = num_classes
        head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        _init_weights(head)
        like = next(self.parameters())
        self.head = head.to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of some stages, taken before their downsampling, and the result of ``forward_features``.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return, negative ones counted from the end; a number n for the last n; None for all.
            norm: apply the final norm to the features of the last stage, the only ones it fits.
            stop_early: stop after the last requested stage; the first result is then the output of that stage.
            output_fmt: ``"NCHW"`` or ``"NHWC"``, for the intermediate features only.
            intermediates_only: return only the intermediate features.

        Returns:
            The result of ``forward_features``, and a list of maps (B, C_i, H_i, W_i) or (B, H_i, W_i, C_i).

        Raises:
            ValueError: for any other format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}')
        last = len(self.layers) - 1
        taken, end = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers[: end + 1] if stop_early else self.layers):
            features, x = stage(x)
            if i in taken:
                intermediates.append(self.norm(features) if norm and i == last else features)
        if output_fmt == "NCHW":
            intermediates = [features.permute(0, 3, 1, 2).contiguous() for features in intermediates]
        if intermediates_only:
            return intermediates
        return (features if stop_early and end < last else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, everything that the features of some stages do not need.

        Args:
            indices: stages to keep, see ``forward_intermediates``.
            prune_norm: also remove the final norm.
            prune_head: also remove the classifier and the pooling. Norm and head always go if the last stage goes.

        Returns:
            The indices of the stages, none of them negative.
        """
        taken, end = feature_take_indices(len(self.layers), indices)
        ends_early = end < len(self.layers) - 1
        self.layers = self.layers[: end + 1]
        self.layers[-1].downsample = nn.Identity()
        if ends_early:
            self.num_features = self.head_hidden_size = self.feature_info[end]["num_chs"]
        if ends_early or prune_norm:
            self.norm = nn.Identity()
        if ends_early or prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, ceil(H / 32), ceil(W / 32), num_features)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            _, x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, H, W, num_features) to logits, or with ``pre_logits`` to the features before the classifier."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SpatialMambaBackbone(SpatialMambaEncoder):
    """Spatial-Mamba as a feature pyramid: images (B, in_chans, H, W) to one map (B, C_i, H_i, W_i) per out_index.

    Map i has stride 4 * 2**i. It is taken before the downsampling of stage i and normalised by ``outnorm{i}``.

    Args:
        out_indices: the stages whose maps are returned, ascending; later stages are left out of the model.
        pretrained: a classification checkpoint to start from, loaded strictly: only its classifier and final
            norm may be unused, and only the ``outnorm`` layers keep their initial values.
        in_chans: see ``SpatialMambaEncoder``.
        **encoder_options: see ``SpatialMambaEncoder``.

    Raises:
        ValueError: for an index without a stage.
        WeightsError: if ``pretrained`` is missing, unsafe or damaged, or does not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        *,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        pretrained: str | PathLike[str] | None = None,
        **encoder_options: Any,
    ) -> None:
        super().__init__(in_chans, **encoder_options)
        self.out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        stages = range(len(self.layers))
        if not self.out_indices or sorted(set(self.out_indices) & set(stages)) != list(self.out_indices):
            raise ValueError(f"out_indices must be ascending stages of 0 to {stages[-1]}, got {self.out_indices}")
        end = self.out_indices[-1] + 1
        self.ends_early = end < len(stages)
        self.layers, self.feature_info = self.layers[:end], self.feature_info[:end]
        self.layers[-1].downsample = nn.Identity()
        self.num_features = self.feature_info[-1]["num_chs"]
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", LayerNorm(self.feature_info[i]["num_chs"]))
        if pretrained:
            load_backbone_weights(self, pretrained)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers):
            features, x = stage(x)
            if i in self.out_indices:
                # Copied: operators downstream, such as RoIAlign, assume the default memory layout.
                maps.append(getattr(self, f"outnorm{i}")(features).permute(0, 3, 1, 2).contiguous())
        return tuple(maps)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _fusion_options(dilations: Sequence[int], kernel_sizes: int | Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The options of ``Block`` for the fusion, sorted by dilation.

    Raises:
        ValueError: naming the invalid option.
    """
    dilations = tuple(dilations)
    sizes = (kernel_sizes,) * len(dilations) if isinstance(kernel_sizes, int) else tuple(kernel_sizes)
    check_dilations(dilations, "fusion_dilations")
    if len(sizes) != len(dilations):
        raise ValueError(f"fusion_kernel_sizes must be one number, or one per dilation of {dilations}, got {sizes}")
    if any(not isinstance(size, int) or size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"fusion_kernel_sizes must be odd positive numbers, got {kernel_sizes}")
    branches = sorted(zip(dilations, sizes, strict=True))
    if len(set(branches)) < len(branches):
        raise ValueError(f"fusion_dilations {dilations} and fusion_kernel_sizes {sizes} name the same kernel twice")
    return dict(
        fusion_dilations=tuple(dilation for dilation, _ in branches),
        fusion_kernel_sizes=tuple(size for _, size in branches),
    )


def _cfg(accuracy: float) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, SMALLEST_SIZE, SMALLEST_SIZE),
        "pool_size": (7, 7),
        "crop_pct": CROP_FRACTION,
        "crop_mode": "center",
        "interpolation": "bicubic",
        **NORMALISATION,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "description": f"published ImageNet-1K top-1 at 224x224: {accuracy}%",
        "paper_name": "Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion",
        "paper_ids": "arXiv:2410.15091",
        "notes": (f"published_top1={accuracy}", "trained on ImageNet-1K, 300 epochs at 224x224"),
    }


PUBLISHED_TOP1 = {"spatial_mamba_tiny": 83.5, "spatial_mamba_small": 84.6, "spatial_mamba_base": 85.3}
default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(accuracy) for name, accuracy in PUBLISHED_TOP1.items()})


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """For timm: the weights of a checkpoint in any known layout, under the names of ``model``.

    Raises:
        WeightsError: if the stages do not fit. timm adapts the first convolution and replaces the classifier, but then
            loads everything else without a check, too.
    """
    path = f"the file for {type(model).__name__}"  # timm does not pass it
    state = model_weights(state_dict, path)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in CLASSIFIER_ONLY}
    own |= {name: state[name] for name in (FIRST_CONV, *CLASSIFIER_ONLY) if name in state}
    problem = describe_misfit(own, {name: t for name, t in state.items() if not name.startswith("outnorm")})
    if problem:
        raise WeightsError(f"{path}: {problem}")
    return state


def _create_model(
    variant: str,
    pretrained: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> SpatialMamba:
    """Build a classifier, or with ``features_only`` a module of its feature maps, on a device and in a dtype."""
    # timm's create_model(checkpoint_path=FILE) keeps the path from this function, and calls torch.load after it has
    # returned; only .npz files go to the model's own load_pretrained. So the types of published checkpoints cannot be
    # allowed for that call alone.
    allow_permanently(config_types())
    if kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(f"feature_cls must be 'getter', got {kwargs['feature_cls']!r}: stages return two tensors")
    dims, depths = VARIANTS[variant]
    options: dict[str, Any] = {"dims": dims, "depths": depths, **kwargs}
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            SpatialMamba,
            f"spatial_mamba_{variant}",
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **options,
        )
    return model if dtype is None else model.to(dtype)


@register_model
def spatial_mamba_tiny(
    num_classes: int = 1000, drop_path_rate: float = 0.2, *, pretrained: bool = False, **kwargs: Any
) -> SpatialMamba:
    """Spatial-Mamba-T: 27M parameters, 4.5 GFLOPs at 224x224.

    Args:
        num_classes: number of logits.
        drop_path_rate: stochastic depth of the last block.
        pretrained: nothing can be downloaded, so this needs a file: ``pretrained_cfg_overlay=dict(file=FILE)``.
        **kwargs: options of ``SpatialMamba`` and of timm's ``create_model``: ``features_only``, ``out_indices``,
            ``device``, ``dtype``, ``pretrained_cfg_overlay``, ...

    Returns:
        The classifier; with ``features_only`` a module that returns feature maps (B, C_i, H_i, W_i).
    """
    return _create_model("tiny", pretrained, num_classes=num_classes, drop_path_rate=drop_path_rate, **kwargs)


@register_model
def spatial_mamba_small(
    num_classes: int = 1000, drop_path_rate: float = 0.3, *, pretrained: bool = False, **kwargs: Any
) -> SpatialMamba:
    """Spatial-Mamba-S: 43M parameters, 7.1 GFLOPs at 224x224; arguments and result as for ``spatial_mamba_tiny``."""
    return _create_model("small", pretrained, num_classes=num_classes, drop_path_rate=drop_path_rate, **kwargs)


@register_model
def spatial_mamba_base(
    num_classes: int = 1000, drop_path_rate: float = 0.5, *, pretrained: bool = False, **kwargs: Any
) -> SpatialMamba:
    """Spatial-Mamba-B: 96M parameters, 15.8 GFLOPs at 224x224; arguments and result as for ``spatial_mamba_tiny``."""
    return _create_model("base", pretrained, num_classes=num_classes, drop_path_rate=drop_path_rate, **kwargs)
