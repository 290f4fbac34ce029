"""Checkpoint files for people: what is in one, other layouts of it, and whether it is what it should be."""
