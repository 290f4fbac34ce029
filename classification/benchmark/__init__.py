"""Measurements of whole models: speed compared with others, their parts, processes and data loading."""
