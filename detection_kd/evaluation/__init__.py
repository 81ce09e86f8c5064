"""How good a detector or a student is: COCO metrics, FROC, operating points, agreement with the
teacher.
"""
