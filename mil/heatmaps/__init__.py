"""Where a trained slide classifier looked: scores of tiles, drawings of them, and pages around
both.
"""
