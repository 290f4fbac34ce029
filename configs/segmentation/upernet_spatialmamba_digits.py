"""A small UPerNet on Spatial-Mamba for the digits of ``python -m spatial_mamba.segmentation.digits``, on two CPU cores.

Batch 16: two processes with 8 images each.
"""

_base_ = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"
randomness = dict(seed=0)

norm_cfg = dict(type="BN")
head = dict(num_classes=11, norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(dims=24, depths=(1, 1, 2, 1), drop_path_rate=0.0, pretrained=None),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=64, **head),
    auxiliary_head=dict(in_channels=96, channels=32, **head),
)

# Mirrored digits are none, so nothing is flipped.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root="data/digits_ade",
    metainfo=dict(classes=("photograph", *"0123456789")),
    reduce_zero_label=True,
)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=200)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", by_epoch=False, begin=100, end=max_iters, eta_min=0.0, power=1.0),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=200, max_keep_ckpts=1))
