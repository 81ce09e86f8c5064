"""Graded patches: sets with an ordered label (SICAPv2, class folders, tables), their splits, their
pixels at the teacher's and the student's resolution, and their augmentation.
"""
