"""MM_SpatialMamba: the backbone with the name and options that OpenMMLab's configs expect."""

from collections.abc import Mapping, Sequence
from inspect import signature
from os import PathLike
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...classification.models.spatial_mamba import SpatialMambaBackbone, SpatialMambaEncoder
from ...classification.models.weights import load_backbone_weights
from ...kernels.errors import UserError


@MODELS.register_module(name="MM_SpatialMamba")
class MMSpatialMamba(SpatialMambaBackbone, BaseModule):
    """Spatial-Mamba as a backbone for mmdet, mmseg and every other user of mmengine's registry.

    It maps images (B, in_chans, H, W) to one map (B, C_i, H_i, W_i) of stride 4 * 2**i per out_index. ``init_weights``
    reads the weights of ``pretrained`` or ``init_cfg``; a runner calls it before training but not before testing.

    Args:
        frozen_stages: -1 trains everything; 0 freezes the stem; i freezes the stem and the first i stages with their
            output norms and downsampling. Frozen modules stay in evaluation mode.
        norm_eval: keep every BatchNorm (in the stem and the downsampling) in evaluation mode: it uses its running
            statistics without updating them, and its weights are trained.
        with_cp: OpenMMLab's name for ``use_checkpoint``.
        pretrained: a classification checkpoint, of this project or a published one; short for ``init_cfg``.
            ``None`` and ``""`` mean none.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``, or a list with one; ``prefix`` selects the backbone
            in a file with several models, ``map_location`` has no effect.
        **options: see ``SpatialMambaBackbone`` and ``SpatialMambaEncoder``.

    Raises:
        UserError: for any other ``init_cfg``, for both ``init_cfg`` and ``pretrained``, or for an unknown option or
            one out of range.
    """

    is_init: bool  # a property of BaseModule

    def __init__(
        self,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | PathLike[str] | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        known = {"out_indices", *signature(SpatialMambaEncoder).parameters}
        if unknown := sorted(options.keys() - known):
            raise UserError(
                f"MM_SpatialMamba has no option {', '.join(unknown)}; options that a config inherits from another "
                "backbone are removed by _delete_=True in the dict(...) of this one"
            )
        if pretrained and init_cfg:
            raise UserError("pretrained and init_cfg both name initial weights; give one of them")
        if pretrained:
            init_cfg = {"type": "Pretrained", "checkpoint": str(pretrained)}
        try:
            super().__init__(**{"use_checkpoint": with_cp, **options})
        except ValueError as error:
            raise UserError(f"MM_SpatialMamba: {error}") from error
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= len(self.layers):
            raise UserError(f"frozen_stages must be -1 (none) to {len(self.layers)} (all), got {frozen_stages!r}")
        self.init_cfg = _single_pretrained(init_cfg) if init_cfg else None
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Load the initial weights strictly, if there are any.

        Raises:
            WeightsError: if the file is missing, unsafe, damaged or does not fit.
        """
        if self.init_cfg is not None and not self.is_init:
            load_backbone_weights(self, self.init_cfg["checkpoint"], self.init_cfg.get("prefix", ""))
        self.is_init = True

    def train(self, mode: bool = True) -> "MMSpatialMamba":
        """Set training mode, except for frozen modules and, with ``norm_eval``, BatchNorms."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        norms = [getattr(self, f"outnorm{i}") for i in self.out_indices if i < self.frozen_stages]
        return [self.patch_embed, *self.layers[: self.frozen_stages], *norms]


def _single_pretrained(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)
    entry = dict(entries[0])
    allowed = {"type", "checkpoint", "prefix", "map_location"}
    if (
        len(entries) != 1
        or entry.get("type") != "Pretrained"
        or not entry.get("checkpoint")
        or not set(entry) <= allowed
    ):
        raise UserError(f"init_cfg must be dict(type='Pretrained', checkpoint=FILE), or a list of one, got {init_cfg}")
    return entry
