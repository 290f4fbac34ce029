"""Pictures of what a model computes and how it was trained: ``spatial-mamba visualize``.

`layers`, `formulations`, `receptive_field` and `run_records` compute. The modules named ``*_picture`` draw, and only
they need matplotlib.
"""
