"""UPerNet on Spatial-Mamba-S, ADE20K at 512x512, 160k iterations, 4 GPUs x 4 images."""

_base_ = "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"

checkpoint_file = "data/pretrained/spatialmamba_small.pth"
model = dict(backbone=dict(depths=(2, 4, 21, 5), drop_path_rate=0.3, pretrained=checkpoint_file))
