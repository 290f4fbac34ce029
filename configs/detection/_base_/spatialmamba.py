"""What all configs for detection and segmentation share: the registration of the backbone, and the hooks."""

custom_imports = dict(imports=["spatial_mamba.detection"])
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="StrictLoadHook"),
    dict(type="SameBuffersHook"),
    dict(type="PreemptionHook"),
]
