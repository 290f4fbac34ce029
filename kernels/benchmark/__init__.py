"""Times the operators beside the published formulations: ``python -m spatial_mamba.kernels.benchmark``."""
