"""Whole-model measurements: speed beside other models, where the time goes, memory, data loading and scale."""
