"""Drawing of Papanicolaou-stained smears, for the cohort that the repository renders itself.

One file an idea: `cells`, `clutter` (what is no lesion), `smear` (a whole picture), `tissue_map`
(its zones), `sample_plan` (the pictures of a cohort). Stains add up as optical density
(Beer-Lambert), in integers, so that the order of drawing does not matter. Per-pixel arithmetic
keeps to +, -, *, / and square root, which IEEE 754 fixes to the last bit, and randomness to the
uniform draws of PCG64: the same seed gives the same pixels on every machine.
"""
