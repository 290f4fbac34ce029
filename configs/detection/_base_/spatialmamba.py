"""Shared by all configs for detection and segmentation: registration of the backbone, and hooks."""

custom_imports = dict(imports=["spatial_mamba.detection"])
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="StrictLoadHook"),
    dict(type="SameBuffersHook"),
    dict(type="PreemptionHook"),
]
