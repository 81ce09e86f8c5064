"""The cohort that the quickstart renders or composes, so that everything runs without a
download.
"""
