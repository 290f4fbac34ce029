"""The inference form of a model: what can be computed once from the weights is, and takes their place.

Nothing of the trained weights is kept beside what was made of them, so it cannot go stale. A fused model gives the
same numbers but for rounding, has no gradients, and neither loads weights nor trains.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import spatial_mixer
from ...kernels.packed_linear import can_pack, pack_weight, packed_linear, packed_mlp, unpack_weight
from ...kernels.state_fusion import merge_taps

# Of the widest activations at once, where they go through memory: few enough for a CPU's cache, and for large images.
HIDDEN_BYTES = {"cpu": 2**23, "cuda": 2**28}


def _how_many(x: Tensor, width: int) -> int:
    """Items of ``width`` hidden values, in the dtype of ``x``, that may be in memory at once; all under a compiler."""
    if torch.compiler.is_compiling():
        return x.numel()
    return max(1, HIDDEN_BYTES.get(x.device.type, HIDDEN_BYTES["cuda"]) // (width * x.element_size()))


class PackedLinear(nn.Module):
    """Weights of a linear layer, packed where the device and the dtype have kernels for it, else as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs = len(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._keep(weight.detach())

    def _keep(self, weight: Tensor) -> None:
        self.packed = can_pack(weight)
        self.register_buffer("weight", pack_weight(weight) if self.packed else weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packed:  # packing depends on the device and the dtype, which are what changes here
            self.weight, self.packed = unpack_weight(self.weight, self.outputs), False
        super()._apply(fn, recurse)
        self._keep(self.weight)
        return self

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """``relu(linear(norm(x)))`` or ``linear(norm(x)) + residual``: (..., inputs) to (..., outputs).

        Raises:
            TypeError: for activations of another dtype than the weights, as autocast makes them.
        """
        if x.dtype != self.weight.dtype:
            raise TypeError(
                f"a fused model computes in the dtype of its weights, {self.weight.dtype}, and got activations of "
                f"{x.dtype}: cast the model with .to({x.dtype}) in place of autocast"
            )
        if self.packed:
            scale = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
            return packed_linear(x, self.weight, self.outputs, self.bias, *scale, relu, residual)
        x = F.linear(x if norm is None else norm(x), self.weight, self.bias)
        if relu:
            x = F.relu_(x)
        return x if residual is None else residual + x


class FusedMlp(nn.Module):
    """LayerNorm, MLP and residual sum: tokens (B, H, W, C) to the same."""

    def __init__(self, norm: nn.LayerNorm, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.fc1 = PackedLinear(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = PackedLinear(mlp.fc2.weight, mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1.packed and self.fc2.packed:
            norm, fc1, fc2 = self.norm, self.fc1, self.fc2
            return packed_mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        tokens = x.flatten(0, 2)
        size = _how_many(x, self.fc1.outputs)
        if size >= len(tokens):
            return self._all(x)
        return torch.cat([self._all(part) for part in tokens.split(size)]).view(x.shape)

    def _all(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, self.norm)), residual=x)


class FusedDownsample(nn.Module):
    """Inverted bottleneck of stride 2: tokens (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C), in parts.

    The hidden activations, eight times as wide as the tokens, are the widest of the network.
    """

    def __init__(self, expand: nn.Conv2d, depthwise: nn.Conv2d, project: nn.Conv2d) -> None:
        super().__init__()
        self.expand = PackedLinear(expand.weight.flatten(1), expand.bias)
        self.depthwise = depthwise
        self.project = PackedLinear(project.weight.flatten(1), project.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows = _how_many(x, width * self.expand.outputs)
        if rows >= height or batch == 0:
            images = rows // height
            return torch.cat([self._all(part) for part in x.split(images)]) if 0 < images < batch else self._all(x)
        # Rows of outputs at a time. The two rows of inputs in front make one more output, of the wrong neighbours.
        step = max(1, rows // 2 - 1)
        bands = []
        for first in range(0, (height + 1) // 2, step):
            start = max(0, 2 * first - 2)
            band = torch.cat([self._all(image[None]) for image in x[:, start : 2 * (first + step)]])
            bands.append(band if first == 0 else band[:, 1:])
        return torch.cat(bands, dim=1)

    def _all(self, x: Tensor) -> Tensor:
        hidden = self.expand(x, relu=True).permute(0, 3, 1, 2)
        return self.project(F.relu_(self.depthwise(hidden)).permute(0, 2, 3, 1))


class FusedMixer(nn.Module):
    """What lies between the projections of a block, its kernels merged: (B, H, W, 2 D) to (B, H, W, D)."""

    def __init__(self, ssm: nn.Module) -> None:
        super().__init__()
        self.eps = ssm.out_norm.eps
        # In the dtype that kernels take them in, which spares conversions in half-precision models.
        compute_dtype = torch.promote_types(ssm.conv2d.weight.dtype, torch.float32)
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
        return spatial_mixer(
            xz,
            self.conv_weight,
            self.conv_bias,
            self.projection_weight,
            self.step_weight,
            self.step_bias,
            self.A_log,
            self.D,
            None,
            None,
            self.norm_weight,
            self.norm_bias,
            self.dilations,
            self.eps,
            taps=self.taps,
            kernel_sizes=self.kernel_sizes,
        )


class FusedBlock(nn.Module):
    """A block, of six operators: tokens (B, H, W, C) to the same."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = block.cpe1, block.cpe2
        self.ln_1 = block.ln_1
        self.in_proj = PackedLinear(block.self_attention.in_proj.weight, None)
        self.mixer = FusedMixer(block.self_attention)
        self.out_proj = PackedLinear(block.self_attention.out_proj.weight, None)
        self.mlp = FusedMlp(block.ln_2, block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.out_proj(self.mixer(self.in_proj(x, self.ln_1)), residual=x)
        return self.mlp(self.cpe2(x))


def refuse_to_load(model: nn.Module, *_: Any) -> None:
    """Hook of ``load_state_dict``.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"a fused {type(model).__name__} loads no weights: load them before fuse()")


def refuse_gradients(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook in front of ``forward``.

    Raises:
        RuntimeError: if the gradient of an image is asked for.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise RuntimeError(f"a fused {type(model).__name__} has no gradients: take the model as it was before fuse()")
