"""Times the operators and the published formulation: ``python -m spatial_mamba.kernels.benchmark``."""
