"""Pictures of what a model computes and of how it was trained: ``python -m spatial_mamba.visualize``.

`layers`, `formulations`, `receptive_field` and `run_records` compute; the modules named ``*_picture`` draw, and only
these need matplotlib.
"""
