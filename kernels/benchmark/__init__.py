"""Times the operators: ``spatial-mamba benchmark operators``."""
