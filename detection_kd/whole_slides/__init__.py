"""From tiles to whole slides and fields: one pass for every detector, merging, files per slide."""
