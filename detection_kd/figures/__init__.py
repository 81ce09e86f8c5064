"""Figures of detectors and students: curves, boxes on images, tiles in feature space."""
