"""The commands ``python -m spatial_mamba`` and ``python -m spatial_mamba.NAME``: the package finds its modules here.

The root of the package, which is that of the repository, stays free of them; see ``spatial_mamba.__path__``.
"""
