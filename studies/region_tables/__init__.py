"""The table of region encoders: cohorts, rows, measures, intervals and the page."""
