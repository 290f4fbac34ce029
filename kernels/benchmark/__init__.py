"""Time the operators: ``spatial-mamba benchmark operators``."""
