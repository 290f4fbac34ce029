"""The parts of a classifier: the bytes and multiply-adds that each cannot do without, and how to run it alone."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...kernels.benchmark.cases import Case
from ...kernels.benchmark.measure import TRAINING_PASSES
from ..models.fused import FusedBlock
from ..models.spatial_mamba import Block, SpatialMamba, StructureAwareSSM

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One part of the model, which may occur several times with the same shapes.

    What lies inside a part (the hidden layer of an MLP, the channels between two convolutions of the stem) need not
    go through memory, and is not counted.
    """

    stage: str
    name: str
    count: int  # how often the model has it
    inputs: tuple[Shape, ...]
    output: Shape
    macs: int  # multiply-adds of one forward pass; element-wise operations and statistics are not counted
    weights: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    is_sum: bool = False  # a residual connection, the backward pass of which adds the gradients at the fork
    takes_images: bool = False  # no gradient of them is asked for

    def compulsory_bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """The fewest bytes that one can move: each input and weight read once, the output written once.

        With ``backward``, of both passes: inputs and weights are read again, the gradient of the output is read, and
        one gradient per input and weight is written.

        Args:
            dtype: of the activations; weights count in their own.
            backward: a forward and a backward pass instead of a forward pass alone.
        """
        inputs = dtype.itemsize * sum(map(math.prod, self.inputs))
        weights = _bytes_of(self.weights)
        output = dtype.itemsize * math.prod(self.output)
        forward = inputs + weights + output
        if not backward:
            return forward
        if self.is_sum:
            return 2 * forward
        gradients = _bytes_of(weight for weight in self.weights if weight.requires_grad)
        return 2 * forward + gradients + (0 if self.takes_images else inputs)

    def operations(self, backward: bool) -> int:
        """Floating-point operations, two per multiply-add."""
        return 2 * self.macs * (TRAINING_PASSES if backward else 1)


def parts_of(model: SpatialMamba, batch: int, height: int, width: int) -> list[Part]:
    """The parts of a classifier, fused or not, for images (batch, in_chans, height, width), in the order they run in.

    The blocks of a stage have the same shapes: the last one stands for all.
    """
    dim, hidden = model.feature_info[0]["num_chs"], model.feature_info[0]["num_chs"] // 2
    half, tokens = (_halved(height), _halved(width)), (_halved(_halved(height)), _halved(_halved(width)))
    stem_macs = math.prod(half) * 9 * hidden * (model.in_chans + 2 * hidden)
    stem_macs += math.prod(tokens) * 4 * dim * (9 * hidden + dim)
    parts = [
        Part(
            "stem",
            "stem",
            1,
            ((batch, model.in_chans, height, width),),
            (batch, *tokens, dim),
            batch * stem_macs,
            weights_of(model.patch_embed),
            model.patch_embed,
            takes_images=True,
        )
    ]
    for i, stage in enumerate(model.layers):
        name, dim = f"stage {i + 1}", model.feature_info[i]["num_chs"]
        parts += _block_parts(name, len(stage.blocks), stage.blocks[-1], (batch, *tokens, dim))
        if not isinstance(stage.downsample, nn.Identity):
            smaller = tuple(map(_halved, tokens))
            parts.append(
                Part(
                    name,
                    "downsample",
                    1,
                    ((batch, *tokens, dim),),
                    (batch, *smaller, 2 * dim),
                    batch * (math.prod(tokens) * 8 * dim * dim + math.prod(smaller) * 8 * dim * (9 + 2 * dim)),
                    weights_of(stage.downsample),
                    stage.downsample,
                )
            )
            tokens = smaller
    classes = model.num_classes or dim
    parts.append(
        Part(
            "head",
            "head",
            1,
            ((batch, *tokens, dim),),
            (batch, classes),
            batch * dim * model.num_classes,
            (*weights_of(model.norm), *weights_of(model.head)),
            lambda x: model.forward_head(model.norm(x)),
        )
    )
    return parts


def macs_per_image(model: SpatialMamba, height: int, width: int) -> int:
    """Multiply-adds of a forward pass."""
    return sum(part.count * part.macs for part in parts_of(model, 1, height, width))


def _block_parts(stage: str, depth: int, block: Block | FusedBlock, tokens: Shape) -> Iterable[Part]:
    dim, inner = tokens[-1], 2 * tokens[-1]
    count, wide, middle = math.prod(tokens[:-1]), (*tokens[:-1], 2 * inner), (*tokens[:-1], inner)

    def part(name: str, inputs: Sequence[Shape], output: Shape, macs: int, call: nn.Module, *others: nn.Module) -> Part:
        weights = tuple(weight for module in (call, *others) for weight in weights_of(module))
        return Part(stage, name, depth, tuple(inputs), output, count * macs, weights, call)

    if isinstance(block, FusedBlock):
        mixer_macs = _mixer_macs(inner, block.mixer.step_weight.shape[1])
        in_proj = part("ln_1, in_proj", [tokens], wide, 2 * dim * inner, block.in_proj, block.ln_1)
        out_proj = part("out_proj + x", [middle, tokens], tokens, dim * inner, block.out_proj)
        yield part("cpe1 + x", [tokens], tokens, 9 * dim, block.cpe1)
        yield replace(in_proj, call=lambda x: block.in_proj(x, block.ln_1))
        yield part("mixer", [wide], middle, mixer_macs, block.mixer)
        yield replace(out_proj, call=lambda y, x: block.out_proj(y, residual=x))
        yield part("cpe2 + x", [tokens], tokens, 9 * dim, block.cpe2)
        yield part("ln_2, mlp + x", [tokens], tokens, 2 * dim * block.mlp.fc1.outputs, block.mlp)
        return

    ssm = block.self_attention
    yield part("cpe1 + x", [tokens], tokens, 9 * dim, block.cpe1)
    yield part("ln_1", [tokens], tokens, 0, block.ln_1)
    yield part("in_proj", [tokens], wide, 2 * dim * inner, ssm.in_proj)
    yield part("mixer", [wide], middle, _mixer_macs(inner, ssm.dt_rank), _without_projections(ssm))
    yield part("out_proj", [middle], tokens, dim * inner, ssm.out_proj)
    yield part("cpe2 + x", [tokens], tokens, 9 * dim, block.cpe2)
    yield part("ln_2", [tokens], tokens, 0, block.ln_2)
    yield part("mlp", [tokens], tokens, 2 * dim * block.mlp.fc1.out_features, block.mlp)
    residual = part("residual sums", [tokens, tokens], tokens, 0, block.residual_sum)
    yield replace(residual, count=2 * depth, is_sum=True)


def weights_of(module: nn.Module) -> tuple[Tensor, ...]:
    """What a module computes with: its parameters, and the buffers that take their place in a fused one."""
    buffers = (buffer for buffer in module.buffers() if buffer.is_floating_point())
    return *module.parameters(), *buffers


def _without_projections(ssm: StructureAwareSSM) -> StructureAwareSSM:
    """What lies between the two projections, as a module of its own."""
    mixer = copy.deepcopy(ssm)
    mixer.in_proj = mixer.out_proj = nn.Identity()
    return mixer


def _mixer_macs(inner: int, rank: int) -> int:
    """Per token: the depthwise convolution, the projection to r, B and C, and the core."""
    core = Case("token", "core", 1, 1, 1, dim=inner, rank=rank)
    return inner * (9 + rank + 2) + core.operations(backward=False) // 2


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _halved(size: int) -> int:
    return math.ceil(size / 2)
