"""Time whole models, their parts, processes and data loading: ``spatial-mamba benchmark models`` and ``loading``."""
