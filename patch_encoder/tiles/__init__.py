"""Tile coordinates: the grid, the file, other tools' formats, GeoJSON."""
