"""Figures of detectors and students: curves, boxes on images, tiles in the teacher's feature
space.
"""
