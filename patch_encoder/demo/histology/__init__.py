"""Drawing of H&E-stained tissue: tumours with mitotic figures and their look-alikes, and prostate
glands of four grades.

One file an idea: `canvas` (two planes of stain), `tissue` (nests, stroma, gaps), `nuclei`,
`mitoses` (their phases), `look_alikes`, `scanner` (stain, optics, sensor), `field` (a whole
picture), and `point_files` (its annotations); `glands` (of each grade) and `biopsy` (a slide).
"""
