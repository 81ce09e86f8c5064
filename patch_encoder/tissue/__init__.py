"""Finds tissue and what only looks like it, and measures the quality of tiles."""
