"""Grading networks at work: predictions of whole sets and the runs that hold them, a teacher's maps
kept for all epochs, and what a prediction costs.
"""
