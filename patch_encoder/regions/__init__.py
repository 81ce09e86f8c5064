"""Regions of G x G tiles: the grid, their files, and the stores that hand out batches of them."""
