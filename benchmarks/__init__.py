"""Figures against named baselines, both in one run."""
