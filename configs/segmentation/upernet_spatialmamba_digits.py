"""A small UPerNet on Spatial-Mamba for the digits of ``python -m spatial_mamba.segmentation.demo_data``, on 2 cores.

Batch 8: two processes with 4 images each.
"""

_base_ = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"
randomness = dict(seed=0)

checkpoint_file = None  # from scratch
norm_cfg = dict(type="BN")
digits = [1.0] * 10
# The photograph covers most pixels and would dominate the loss. It has a low weight in the loss of the decode head and
# none in the loss of the auxiliary head, which only distinguishes digits.
model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(dims=32, depths=(1, 1, 2, 1), drop_path_rate=0.0, pretrained=checkpoint_file),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=32,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=[0.5, *digits]),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=[0.0, *digits], loss_weight=1.0),
    ),
)

# No flips: a mirrored digit is not a digit.
train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
test_pipeline = train_pipeline
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
data_root = "data/digits_ade/"
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=("photograph", *"0123456789")),
    reduce_zero_label=True,
    pipeline=train_pipeline,
)
total_batch = dict(images=8, processes=2)
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dataset)
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dataset)
test_dataloader = val_dataloader

max_iters = 2000
train_cfg = dict(max_iters=max_iters, val_interval=500)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", by_epoch=False, begin=100, end=max_iters, eta_min=0.0, power=1.0),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=500, max_keep_ckpts=2))
