"""Data sets of tiles."""
