"""Mask R-CNN with FPN on Spatial-Mamba-T, COCO, 1x (12 epochs): mmdet's recipe for Swin-T."""

_base_ = ["mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "_base_/spatialmamba.py"]

pretrained = "data/pretrained/spatialmamba_tiny.pth"  # or --cfg-options model.backbone.pretrained=FILE
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        drop_path_rate=0.2,
        pretrained=pretrained,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, norm=dict(decay_mult=0.0))))
