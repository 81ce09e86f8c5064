"""The table and the figure of an ablation, read from what its stages left on disk."""
