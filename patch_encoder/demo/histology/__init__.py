"""Drawing of H&E-stained tumour tissue with mitotic figures and their look-alikes.

One file an idea: `canvas` (two planes of stain), `tissue` (nests, stroma, gaps), `nuclei`,
`mitoses` (their phases), `look_alikes`, `scanner` (stain, optics, sensor), `field` (a whole
picture), and `point_files` (its annotations).
"""
