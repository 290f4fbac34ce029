"""RetinaNet with FPN on Spatial-Mamba-T, COCO, 1x (12 epochs): mmdet's recipe for Swin-T, with AdamW."""

_base_ = ["mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py", "_base_/spatialmamba.py"]

pretrained = "data/pretrained/spatialmamba_tiny.pth"  # or --cfg-options model.backbone.pretrained=FILE
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        pretrained=pretrained,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
