"""Slide pages: a Deep Zoom pyramid of each slide, the results of the stages as layers over it, and
pages that open from a disk without a server.
"""
