"""UPerNet on Spatial-Mamba-T, ADE20K at 512x512, 160k iterations, 16 images: mmseg's recipe for Swin-T."""

_base_ = [
    "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
    "../detection/_base_/spatialmamba.py",
]
custom_imports = dict(imports=["spatial_mamba.segmentation"])

checkpoint_file = "data/pretrained/spatialmamba_tiny.pth"  # or --cfg-options model.backbone.pretrained=FILE
backbone_norm_cfg = None  # the base config sets it for its own backbone
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        drop_path_rate=0.2,
        pretrained=checkpoint_file,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, norm=dict(decay_mult=0.0))))

train_dataloader = dict(batch_size=4)
total_batch = dict(images=16, processes=4)  # tools/train.py keeps this number of images
auto_scale_lr = dict(enable=False, base_batch_size=16)

# The published multi-scale test.
img_ratios = [0.75, 1.0, 1.25]
tta_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(2048 * r), int(512 * r)), keep_ratio=True) for r in img_ratios],
            [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
