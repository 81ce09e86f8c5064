"""Tiles for pre-training, straight from whole slides: which ones, in which order, and read fast."""
