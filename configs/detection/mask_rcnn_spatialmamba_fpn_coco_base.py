"""Mask R-CNN with FPN on Spatial-Mamba-B, COCO, 1x (12 epochs)."""

_base_ = "mask_rcnn_spatialmamba_fpn_coco_tiny.py"

pretrained = "data/pretrained/spatialmamba_base.pth"
model = dict(
    backbone=dict(dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5, pretrained=pretrained),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
