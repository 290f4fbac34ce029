"""Infers the architecture of a Spatial-Mamba from the names and shapes of its weights."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

VARIANTS = {"tiny": (64, (2, 4, 8, 4)), "small": (64, (2, 4, 21, 5)), "base": (96, (2, 4, 21, 5))}
PUBLISHED_KERNELS = {"kernel_3": (1, 3), "kernel_3_1": (3, 3), "kernel_3_2": (5, 3)}  # dilation and size

FIRST_CONV = "patch_embed.conv1.conv.weight"
FUSED = "holds the weights of a fused model, which cannot be loaded; save the model before fuse()"


def _text(branches: Iterable[tuple[int, int]]) -> str:
    """Fusion kernels, given by dilation and size, for messages."""
    return ", ".join(f"{size}x{size} dilation {dilation}" for dilation, size in branches) or "none"


PUBLISHED_FUSION = _text(PUBLISHED_KERNELS.values())


@dataclass(frozen=True)
class Architecture:
    """The options of a model that its weights determine.

    Attributes:
        num_classes: of a classifier, 0 if it has no last layer; None for a backbone.
        out_indices: the stages of a backbone that have an output norm; empty for a classifier.
        others: see ``SpatialMambaEncoder``.
    """

    in_chans: int
    dims: int
    depths: tuple[int, ...]
    mlp_ratio: float
    fusion_dilations: tuple[int, ...]
    fusion_kernel_sizes: tuple[int, ...]
    num_classes: int | None = None
    out_indices: tuple[int, ...] = ()

    @property
    def encoder(self) -> "Architecture":
        """The same architecture without classifier and output norms."""
        return replace(self, num_classes=None, out_indices=())

    @property
    def variant(self) -> str:
        """``"tiny"``, ``"small"``, ``"base"``, or ``"custom"``."""
        widths = (self.dims, self.depths)
        regular = self.mlp_ratio == 4 and self.fusion == PUBLISHED_FUSION
        return next((name for name, shape in VARIANTS.items() if regular and shape == widths), "custom")

    @property
    def fusion(self) -> str:
        """The fusion kernels, for messages."""
        return _text(zip(self.fusion_dilations, self.fusion_kernel_sizes, strict=True))

    def options(self) -> dict[str, Any]:
        """Arguments of ``SpatialMamba``, or of ``SpatialMambaBackbone`` if there is no classifier."""
        options = asdict(self)
        del options["num_classes" if self.num_classes is None else "out_indices"]
        return options

    def __str__(self) -> str:
        parts = [f"dims {self.dims}", f"depths {'-'.join(map(str, self.depths))}", f"fusion {self.fusion}"]
        parts += [f"{self.in_chans} channels"] if self.in_chans != 3 else []
        parts += [f"MLP ratio {self.mlp_ratio:g}"] if self.mlp_ratio != 4 else []
        what = "backbone" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{self.variant} ({', '.join(parts)}; {what})"


def is_fused(state: Iterable[str]) -> bool:
    """Whether names of weights are those of a fused model."""
    return any(name.endswith(".mixer.taps") for name in state)


def architecture_of(state: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture that the weights belong to, or None if they are not a complete Spatial-Mamba, or a fused one.

    Args:
        state: the state dict of a classifier or backbone; parameters of other models in it are ignored.
    """
    if is_fused(state):
        return None
    shapes = {name: tuple(entry.shape) for name, entry in state.items() if isinstance(entry, Tensor)}
    try:
        depths = _depths(shapes)
        dims, in_chans = shapes["layers.0.blocks.0.ln_1.weight"][0], shapes[FIRST_CONV][1]
        mlp_ratio = _mlp_ratio([shapes[f"layers.{i}.blocks.0.mlp.fc1.weight"][0] for i in range(len(depths))], dims)
        fusion = _fusion_kernels(shapes)
        num_classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    except (KeyError, IndexError, ZeroDivisionError):
        return None
    is_backbone = any(name.startswith("outnorm") for name in shapes) or "norm.weight" not in shapes
    return Architecture(
        in_chans=in_chans,
        dims=dims,
        depths=depths,
        mlp_ratio=mlp_ratio,
        fusion_dilations=tuple(dilation for dilation, _ in fusion),
        fusion_kernel_sizes=tuple(size for _, size in fusion),
        num_classes=None if is_backbone else num_classes,
        out_indices=tuple(i for i in range(len(depths)) if f"outnorm{i}.weight" in shapes) if is_backbone else (),
    )


def describe_other_architecture(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """How the architectures of a model and a file differ, and the fix; None if they agree or cannot be inferred."""
    if is_fused(state):
        return FUSED
    model, file = architecture_of(own), architecture_of(state)
    if model is None or file is None or model == file:
        return None
    if model.encoder != file.encoder:
        theirs, ours = file.encoder.options(), model.encoder.options()
        changes = ", ".join(f"{name}={value}" for name, value in theirs.items() if value != ours[name])
        return f"holds another model, {file}, instead of {model}; choose that model or config, with {changes}"
    if model.num_classes is None and file.num_classes is None:
        if not all(name.startswith("outnorm") for name in own.keys() ^ state.keys()):
            return None
        return (
            f"its output norms are those of out_indices={file.out_indices}, but the model has {model.out_indices}; "
            "build the model with those, or start from the file with pretrained=FILE"
        )
    if model.num_classes is None:
        return "holds a classifier, but the model is a backbone; start from the file with pretrained=FILE"
    if file.num_classes is None:
        return "holds a backbone, but the model is a classifier; use the file of a classifier"
    return (
        f"its classifier has {file.num_classes} classes, but the model has {model.num_classes}; "
        f"build the model with num_classes={file.num_classes}, or replace its classifier after loading"
    )


def _depths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Number of blocks of each stage; KeyError if a block is missing or there are none."""
    found = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.ln_1\.weight$", name) for name in shapes]
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    counts = Counter(stage for stage, _ in blocks)
    depths = tuple(counts[stage] for stage in range(len(counts)))
    if not depths or blocks != {(stage, block) for stage, depth in enumerate(depths) for block in range(depth)}:
        raise KeyError("blocks")
    return depths


def _mlp_ratio(hidden: Sequence[int], dims: int) -> float:
    """The MLP ratio that gives these hidden widths, one per stage; the stages are ``dims * 2**i`` wide."""
    width = dims * 2 ** (len(hidden) - 1)
    ratio = hidden[-1] / width
    # Hidden widths are rounded down. The midpoint of the ratios that give the last width also gives the others.
    fits = all(int(ratio * dims * 2**i) == size for i, size in enumerate(hidden))
    return ratio if fits else (hidden[-1] + 0.5) / width


def _fusion_kernels(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Dilation and size of each fusion kernel of the first block, sorted; KeyError if shape and name disagree."""
    prefix = "layers.0.blocks.0.self_attention.state_fusion."
    found = []
    for name in (name.removeprefix(prefix) for name in shapes if name.startswith(f"{prefix}kernel_")):
        match = re.fullmatch(r"kernel_(\d+)_dilation_(\d+)", name)
        dilation, size = (int(match[2]), int(match[1])) if match else PUBLISHED_KERNELS[name]
        if shapes[f"{prefix}{name}"][-1] != size:
            raise KeyError(name)
        found.append((dilation, size))
    return sorted(found)
