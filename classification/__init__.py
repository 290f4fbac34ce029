"""Image classification with Spatial-Mamba: models and the ImageNet trainer."""
