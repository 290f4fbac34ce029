"""Conversion of a model to its inference form: checks, folded BatchNorms, and the modules of `fused`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...kernels.tensors import compute_dtype_for
from .fused import FusedBlock, FusedConv, FusedDownsample, settings_of
from .operands import is_downsampling, is_modified, is_pointwise
from .spatial_mamba import (
    MIXER_PARTS,
    MLP_PARTS,
    Block,
    ConvLayer,
    DepthwiseConv,
    Downsample,
    InvertedBottleneck,
    LayerNorm,
    Mlp,
    PositionEncoding,
    Reduction,
    ResidualSum,
    SpatialMambaEncoder,
    StructureAwareSSM,
)


def convert(model: SpatialMambaEncoder) -> None:
    """Convert the model in place; see ``SpatialMambaEncoder.fuse``. A model that cannot be converted is not changed.

    Raises:
        RuntimeError: see `refuse_modified_parts`.
    """
    refuse_modified_parts(model)
    layers = [module for module in model.modules() if isinstance(module, ConvLayer)]
    folded = [folded_conv(layer) for layer in layers]
    blocks = [[FusedBlock(block) for block in stage.blocks] for stage in model.layers]
    for layer, conv in zip(layers, folded, strict=True):
        layer.conv, layer.norm = conv, nn.Identity()
    for module in model.patch_embed.modules():
        if isinstance(module, ConvLayer):
            module.conv = FusedConv(module.conv, relu=isinstance(module.act, nn.ReLU))
            module.act = nn.Identity()
    for stage, fused_blocks in zip(model.layers, blocks, strict=True):
        stage.blocks = nn.ModuleList(fused_blocks)
        if not isinstance(stage.downsample, nn.Identity):
            stage.downsample = FusedDownsample(*(layer.conv for layer in stage.downsample.conv))
    model.requires_grad_(False)
    model.register_load_state_dict_pre_hook(_refuse_to_load)
    model.register_forward_pre_hook(_refuse_gradients)
    model.fused = True


def folded_conv(layer: ConvLayer) -> nn.Conv2d:
    """The convolution with the current BatchNorm folded into its weights, computed in float32 or wider."""
    conv: Any = layer.conv
    norm: Any = layer.norm
    if isinstance(norm, nn.Identity):
        return conv
    dtype, compute_dtype = conv.weight.dtype, compute_dtype_for(conv.weight)
    own: Any = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, variance, scale, shift = [t if t is None else t.to(compute_dtype) for t in own]
    fused: Any = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)  # type: ignore[arg-type]
    folded = nn.Conv2d(**settings_of(conv), device="meta")  # draws no random numbers
    folded.weight, folded.bias = (nn.Parameter(tensor.detach().to(dtype)) for tensor in fused)
    return folded.eval()


def _refuse_to_load(model: nn.Module, *_: Any) -> None:
    """Hook of ``load_state_dict``.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"a fused {type(model).__name__} loads no weights: load them before fuse()")


def _refuse_gradients(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook that runs before ``forward``.

    Raises:
        RuntimeError: if an image requires a gradient.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise RuntimeError(f"a fused {type(model).__name__} has no gradients: use the model as it was before fuse()")


# Modules that inference forms do not call, because they read the weights: the parts of each block and downsampling.
BLOCK_PARTS: dict[str, type[nn.Module]] = {
    "": Block,
    ".cpe1": PositionEncoding,
    ".ln_1": LayerNorm,
    ".self_attention": StructureAwareSSM,
    ".self_attention.in_proj": nn.Linear,
    **{f".self_attention.{name}": kind for name, kind in MIXER_PARTS.items()},
    ".self_attention.out_proj": nn.Linear,
    ".cpe2": PositionEncoding,
    ".ln_2": LayerNorm,
    ".mlp": Mlp,
    **{f".mlp.{name}": kind for name, kind in MLP_PARTS.items()},
    ".residual_sum": ResidualSum,
}
DOWNSAMPLE_PARTS: dict[str, type[nn.Module]] = {
    "": Downsample,
    ".conv.0": ConvLayer,
    ".conv.0.act": nn.Identity,
    ".conv.1": Reduction,
    ".conv.1.act": nn.ReLU,
    ".conv.2": ConvLayer,
    ".conv.2.act": nn.Identity,
    ".conv": InvertedBottleneck,  # the last, since its settings are those of its layers
}


def refuse_modified_parts(model: SpatialMambaEncoder) -> None:
    """Check that the weights of the stem and the stages describe what they compute, before reading them.

    Raises:
        RuntimeError: naming a module that has hooks, is in training mode, or was wrapped, replaced or changed.
    """

    def check(name: str, *kinds: type[nn.Module]) -> None:
        module = model.get_submodule(name)
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in module.parameters(recurse=False))
        if not plain or all(is_modified(module, kind) for kind in kinds) or not _has_standard_settings(module):
            raise RuntimeError(
                f"{name} has hooks, is in training mode, or was wrapped, replaced or changed "
                f"({type(module).__name__}), but only the weights of the original layer would be used: remove the "
                "hooks, call eval(), unwrap the layer or restore it"
            )

    for name, layer in model.named_modules():
        if isinstance(layer, ConvLayer):
            check(name, ConvLayer, Reduction)
            check(f"{name}.conv", nn.Conv2d)
            check(f"{name}.act", nn.ReLU, nn.Identity)
            norm = type(layer.norm)
            check(f"{name}.norm", nn.Identity, norm if issubclass(norm, _BatchNorm) else nn.BatchNorm2d)
    for i, stage in enumerate(model.layers):
        for j in range(len(stage.blocks)):
            for part, kind in BLOCK_PARTS.items():
                check(f"layers.{i}.blocks.{j}{part}", kind)
        for part, kind in DOWNSAMPLE_PARTS.items() if not isinstance(stage.downsample, nn.Identity) else ():
            check(f"layers.{i}.downsample{part}", kind)


def _has_standard_settings(module: Any) -> bool:
    """Whether the module computes what its type says: settings other than weights can be changed, too."""
    if isinstance(module, DepthwiseConv):
        return module.is_standard
    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    if isinstance(module, nn.Dropout):
        return not module.training or module.p == 0.0
    if isinstance(module, ResidualSum):
        return not module.training or module.drop_prob == 0.0
    if isinstance(module, InvertedBottleneck):
        layers: Any = module
        expand, reduce, project = (layer.conv for layer in layers)
        return is_pointwise(expand) and is_downsampling(reduce) and is_pointwise(project)
    if isinstance(module, _BatchNorm):  # a subclass may compute something else
        plain = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        return plain and module.running_mean is not None and not module.training
    return True
