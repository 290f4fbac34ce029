"""The inference form of a model: everything that depends only on the weights is computed once and replaces them.

The trained weights are not kept, so nothing can go stale. A fused model gives the same numbers up to rounding. It has
no gradients, cannot be trained and loads no weights.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import downsampling, spatial_mixer
from ...kernels.backends import custom_operators_fail, has_kernels, plain_eager
from ...kernels.packed_linear import (
    can_pack,
    pack_weight,
    packed_downsampling,
    packed_linear,
    packed_mlp,
    unpack_weight,
)
from ...kernels.state_fusion import merge_taps
from ...kernels.tensors import compute_dtype_for
from .operands import is_pointwise
from .spatial_mamba import Block, Mlp, StructureAwareSSM

# Memory budget for the widest intermediate. On a CPU it fits the cache; on a GPU it bounds the memory of large images.
HIDDEN_BYTES = {"cpu": 2**23, "cuda": 2**28}


def items_in_budget(x: Tensor, width: int) -> int:
    """Number of items of ``width`` values in the dtype of ``x`` that fit the budget; no limit under a compiler."""
    if torch.compiler.is_compiling():
        return x.numel()
    return max(1, HIDDEN_BYTES.get(x.device.type, HIDDEN_BYTES["cuda"]) // (width * x.element_size()))


def calls_libraries(x: Tensor) -> bool:
    """Whether to call cuBLAS and cuDNN with a fused epilogue: on NVIDIA GPUs, outside compilers and torch.func."""
    return x.is_cuda and not torch.version.hip and not torch.compiler.is_compiling() and not custom_operators_fail()


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as a linear layer, (B, C, H, W) in channels-last memory."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def settings_of(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments that make a convolution like this one."""
    geometry = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in ("in_channels", "out_channels", *geometry)}


class FusedConv(nn.Conv2d):
    """Convolution, then optional ReLU, (B, C, H, W) in channels-last memory.

    On GPUs PyTorch's convolutions add the bias in a pass of their own. Here cuDNN adds it if ReLU follows, and a 1x1
    convolution is a linear layer, where cuBLAS adds it.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__(**settings_of(conv), device="meta")
        self.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last), requires_grad=False)
        self.bias = conv.bias
        self.relu = relu
        self.relu_in_cudnn = relu and self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        if calls_libraries(x):
            if is_pointwise(self):
                out = pointwise_conv(x, self.weight, self.bias)
                return F.relu_(out) if self.relu else out
            if self.relu_in_cudnn and x.dtype.itemsize == 2 and torch.backends.cudnn.enabled:
                options: Any = (self.stride, self.padding, self.dilation, self.groups)
                try:
                    return torch.cudnn_convolution_relu(x, self.weight, self.bias, *options)
                except RuntimeError:
                    self.relu_in_cudnn = False  # this version of cuDNN has no kernel for it on this GPU
        out = super().forward(x)
        return F.relu_(out) if self.relu else out


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed if there is a kernel for its device and dtype."""

    weight: Tensor
    bias: Any  # Tensor or None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs = len(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._set_weight(weight.detach())

    def _set_weight(self, weight: Tensor) -> None:
        self.packed = can_pack(weight)
        self.register_buffer("weight", pack_weight(weight) if self.packed else weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packed:  # packing depends on the device and the dtype, which this method changes
            self.weight, self.packed = unpack_weight(self.weight, self.outputs), False
        super()._apply(fn, recurse)
        self._set_weight(self.weight)
        return self

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """``relu(linear(norm(x)))`` or ``linear(norm(x)) + residual``: (..., inputs) to (..., outputs).

        Without a bias, the result may take the memory of ``residual``, which must be contiguous.

        Raises:
            TypeError: if activations and weights have different dtypes, as under autocast.
        """
        if x.dtype != self.weight.dtype:
            raise TypeError(
                f"a fused model computes in the dtype of its weights, {self.weight.dtype}, but got activations of "
                f"{x.dtype}: cast the model with .to({x.dtype}) instead of using autocast"
            )
        if self.packed:
            before: dict[str, Any] = {}
            if norm is not None:
                before = dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
            return packed_linear(x, self.weight, self.outputs, self.bias, relu=relu, residual=residual, **before)
        x = x if norm is None else norm(x)
        if calls_libraries(x):
            rows, matrix = x.flatten(0, -2), self.weight.t()
            if relu and self.bias is not None:
                return torch._addmm_activation(self.bias, rows, matrix).view(*x.shape[:-1], self.outputs)
            if residual is not None and self.bias is None:
                residual.view(-1, self.outputs).addmm_(rows, matrix)  # out of place, addmm would copy the residual
                return residual
        x = F.linear(x, self.weight, self.bias)
        if relu:
            x = F.relu_(x)
        return x if residual is None else residual + x


class FusedMlp(nn.Module):
    """``x + MLP(LayerNorm(x))`` for tokens (B, H, W, C)."""

    def __init__(self, norm: nn.LayerNorm, mlp: Mlp) -> None:
        super().__init__()
        self.norm = norm
        self.fc1 = PackedLinear(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = PackedLinear(mlp.fc2.weight, mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        norm, fc1, fc2 = self.norm, self.fc1, self.fc2
        if fc1.packed and fc2.packed and fc1.bias is not None and fc2.bias is not None:
            return packed_mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        tokens = x.flatten(0, 2)
        size = items_in_budget(x, self.fc1.outputs)
        if size >= len(tokens):
            return self._compute(x)
        return torch.cat([self._compute(part) for part in tokens.split(size)]).view(x.shape)

    def _compute(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, self.norm)), residual=x)


class FusedDownsample(nn.Module):
    """Inverted bottleneck of stride 2: tokens (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C).

    Its hidden activations, eight times as wide as the tokens, are the widest of the network. So it works in parts.
    """

    def __init__(self, expand: nn.Conv2d, depthwise: nn.Conv2d, project: nn.Conv2d) -> None:
        super().__init__()
        self.expand = PackedLinear(expand.weight.flatten(1), expand.bias)
        self.depthwise = depthwise
        self.project = PackedLinear(project.weight.flatten(1), project.bias)

    def forward(self, x: Tensor) -> Tensor:
        expand, project = self.expand, self.project
        conv: Any = self.depthwise
        weights: dict[str, Any] = dict(
            expand=expand.weight,
            expand_bias=expand.bias,
            conv_weight=conv.weight,
            conv_bias=conv.bias,
            project=project.weight,
            project_bias=project.bias,
        )

        def by_operator(part: Tensor) -> Tensor:
            return downsampling(part, **weights)

        compute = self._by_layers
        if plain_eager(conv.weight, conv.bias) and all(w is not None and w.dtype == x.dtype for w in weights.values()):
            if expand.packed and project.packed:
                return packed_downsampling(x, **weights)
            if has_kernels("downsampling", x) and not expand.packed and not project.packed:
                if x.device.type == "cpu":  # the kernels work in parts themselves
                    return by_operator(x)
                compute = by_operator
        batch, height, width, _ = x.shape
        rows = items_in_budget(x, width * self.expand.outputs)
        if rows >= height or batch == 0:
            images = rows // height
            if not 0 < images < batch:
                return compute(x)
            return torch.cat([compute(part) for part in x.split(images)])
        # Bands of output rows. Each band also reads the two input rows before it; the extra output row they give has
        # wrong neighbours and is dropped.
        step = max(1, rows // 2 - 1)
        bands = []
        for first in range(0, (height + 1) // 2, step):
            start = max(0, 2 * first - 2)
            band = torch.cat([compute(image[None]) for image in x[:, start : 2 * (first + step)]])
            bands.append(band if first == 0 else band[:, 1:])
        return torch.cat(bands, dim=1)

    def _by_layers(self, part: Tensor) -> Tensor:
        hidden = self.expand(part, relu=True)
        return self.project(F.relu_(self.depthwise(hidden.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class FusedMixer(nn.Module):
    """`spatial_mixer` with merged fusion kernels: (B, H, W, 2 D) to (B, H, W, D). Buffers have its argument names."""

    def __init__(self, ssm: StructureAwareSSM) -> None:
        super().__init__()
        self.eps = ssm.out_norm.eps
        # Stored in the dtype that the kernels compute in, which saves conversions in half-precision models.
        compute_dtype = compute_dtype_for(ssm.conv2d.weight)
        weights = {
            "conv_weight": ssm.conv2d.weight,
            "conv_bias": ssm.conv2d.bias,
            "step_weight": ssm.dt_projs_weight,
            "step_bias": ssm.dt_projs_bias,
            "A_log": ssm.A_logs.squeeze(1),
            "D": ssm.Ds,
            "norm_weight": ssm.out_norm.weight,
            "norm_bias": ssm.out_norm.bias,
        }
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach().to(compute_dtype))
        self.register_buffer("projection_weight", ssm.x_proj_weight.detach())
        kernels, alpha, self.dilations = ssm.state_fusion.branches(ssm.Ds)
        self.kernel_sizes = tuple(kernel.shape[-1] for kernel in kernels)
        self.register_buffer("taps", merge_taps(kernels, alpha.to(compute_dtype), self.dilations).detach())

    def forward(self, xz: Tensor) -> Tensor:
        weights: dict[str, Any] = self._buffers
        return spatial_mixer(
            xz,
            kernels=None,
            alpha=None,
            dilations=self.dilations,
            kernel_sizes=self.kernel_sizes,
            eps=self.eps,
            **weights,
        )


class FusedBlock(nn.Module):
    """``Block`` as six operators, for tokens (B, H, W, C)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        # In the dtype that the kernels compute in, as in `FusedMixer`.
        compute_dtype = compute_dtype_for(block.cpe1.weight)
        self.cpe1, self.cpe2 = (deepcopy(layer).to(compute_dtype) for layer in (block.cpe1, block.cpe2))
        ssm = block.self_attention
        self.ln_1 = block.ln_1
        self.in_proj = PackedLinear(ssm.in_proj.weight, ssm.in_proj.bias)
        self.mixer = FusedMixer(ssm)
        self.out_proj = PackedLinear(ssm.out_proj.weight, ssm.out_proj.bias)
        self.mlp = FusedMlp(block.ln_2, block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.out_proj(self.mixer(self.in_proj(x, self.ln_1)), residual=x)
        return self.mlp(self.cpe2(x))
