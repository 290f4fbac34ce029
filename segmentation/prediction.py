"""Classify the pixels of images.

For every image NAME.*, the output folder gets NAME.png, the image with the classes drawn over it, NAME_labels.png, the
class index of every pixel, and NAME.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn

from ..detection.openmmlab import inference


class Segmentor(inference.Predictor):
    """A semantic segmentor of mmseg."""

    package = "mmseg"
    endings = (".png", "_labels.png", ".json")

    def build(self, config: Config, device: torch.device) -> nn.Module:
        from mmengine.model import revert_sync_batchnorm
        from mmseg.apis import init_model

        config.test_pipeline = config.test_dataloader.dataset.pipeline  # where mmseg's API looks for it
        return revert_sync_batchnorm(init_model(config, device=device))

    def predict(self, image: np.ndarray, stem: Path) -> tuple[dict[str, Any], str]:
        """See ``Predictor``; the classes are sorted by decreasing area."""
        from mmseg.apis import inference_model, show_result_pyplot

        meta = self.model.dataset_meta
        result = inference_model(self.model, image).cpu()
        labels = result.pred_sem_seg.data[0].numpy()  # (H, W)
        Image.fromarray(labels.astype(np.uint8 if len(meta["classes"]) <= 256 else np.uint16)).save(
            f"{stem}_labels.png"
        )
        if not meta.get("palette"):
            meta["palette"] = np.random.default_rng(0).integers(0, 256, (len(meta["classes"]), 3)).tolist()
        show_result_pyplot(self.model, image[..., ::-1], result, draw_gt=False, show=False, out_file=f"{stem}.png")

        ids, counts = np.unique(labels, return_counts=True)
        classes = [
            {
                "label": meta["classes"][index],
                "label_id": index,
                "pixels": count,
                "share": round(count / labels.size, 6),
            }
            for count, index in sorted(zip(counts.tolist(), ids.tolist(), strict=True), reverse=True)
        ]
        summary = ", ".join(f"{entry['label']} {entry['share']:.1%}" for entry in classes[:3])
        more = f" and {len(classes) - 3} more" if len(classes) > 3 else ""
        height, width = labels.shape
        return {"width": width, "height": height, "classes": classes}, summary + more


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny"
    inference.predict(Segmentor, inference.common_parser(__doc__, "segmentation", config), argv)
