"""What a set of predictions is worth: metrics of every kind of task, thresholds, calibration,
tests, tables, pictures.
"""
