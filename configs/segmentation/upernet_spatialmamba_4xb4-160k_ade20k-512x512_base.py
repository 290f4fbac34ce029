"""UPerNet on Spatial-Mamba-B, ADE20K at 512x512, 160k iterations, 4 GPUs x 4 images."""

_base_ = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"

checkpoint_file = "data/pretrained/spatialmamba_base.pth"
model = dict(
    backbone=dict(dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5, pretrained=checkpoint_file),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
