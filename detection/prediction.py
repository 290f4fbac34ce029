"""Detect objects in images.

For every image NAME.*, the output folder gets NAME.png, the image with boxes and masks drawn over it, and NAME.json.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from .openmmlab import inference


class Detector(inference.Predictor):
    """A detector of mmdet, with or without masks."""

    package = "mmdet"
    endings = (".png", ".json")

    def build(self, config: Config, device: torch.device) -> nn.Module:
        from mmdet.apis import init_detector

        return init_detector(config, palette="random", device=device)  # the checkpoint's replaces it

    def predict(self, image: np.ndarray, stem: Path) -> tuple[dict[str, Any], str]:
        """See ``Predictor``; boxes are in pixels of the image, masks in COCO's run-length encoding."""
        from mmdet.apis import inference_detector
        from mmdet.structures.mask import encode_mask_results
        from mmdet.visualization import DetLocalVisualizer

        threshold, meta = self.args.score_threshold, self.model.dataset_meta
        result = inference_detector(self.model, image).cpu()
        found = result.pred_instances[result.pred_instances.scores > threshold]
        result.pred_instances = found

        visualizer = DetLocalVisualizer(name=stem.name)
        visualizer.dataset_meta = {"classes": meta["classes"], "palette": meta.get("palette") or "random"}
        visualizer.add_datasample(
            stem.name, image[..., ::-1], result, draw_gt=False, pred_score_thr=threshold, out_file=f"{stem}.png"
        )

        detections = [
            {
                "label": meta["classes"][label],
                "label_id": label,
                "score": round(score, 4),
                "box": [round(value, 2) for value in box],
            }
            for label, score, box in zip(
                found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True
            )
        ]
        if "masks" in found:
            for detection, code in zip(detections, encode_mask_results(found.masks.numpy()), strict=True):
                detection["mask"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        height, width = image.shape[:2]
        numbers = Counter(detection["label"] for detection in detections)
        summary = ", ".join(f"{count} {label}" for label, count in numbers.most_common())
        prediction = {"width": width, "height": height, "score_threshold": threshold, "detections": detections}
        return prediction, summary or f"no object with a score above {threshold:g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = inference.common_parser(__doc__, "detection", "mask_rcnn_spatialmamba_fpn_coco_tiny")
    parser.add_argument(
        "--score-threshold", type=_score, default=0.3, metavar="SCORE", help="lowest score shown (default: %(default)s)"
    )
    inference.predict(Detector, parser, argv)


def _score(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value
