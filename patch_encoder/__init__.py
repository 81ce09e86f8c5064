"""Everything between a slide and its features: slides, tissue, tiles, encoders, feature bags."""
