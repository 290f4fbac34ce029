"""Inspects, converts and verifies checkpoint files."""
