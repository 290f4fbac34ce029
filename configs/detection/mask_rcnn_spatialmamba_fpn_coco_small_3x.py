"""Mask R-CNN with FPN on Spatial-Mamba-S, COCO, 3x (36 epochs, multi-scale, crops)."""

_base_ = "mask_rcnn_spatialmamba_fpn_coco_tiny_3x.py"

pretrained = "data/pretrained/spatialmamba_small.pth"
model = dict(backbone=dict(depths=(2, 4, 21, 5), drop_path_rate=0.3, pretrained=pretrained))
