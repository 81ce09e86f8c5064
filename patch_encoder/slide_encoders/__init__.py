"""Slide encoders: from the features of a slide's tiles to one vector per slide."""
