"""A second opinion on the mitoses of a slide: is each figure a typical one?"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from detection_kd.models.atypical import AtypicalHead, read_crops, score_crops
from detection_kd.whole_slides.mitosis_candidates import Candidates
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import SlideJob


def judge_figures(
    head: AtypicalHead, job: SlideJob, found: Candidates, threshold: float
) -> Float[np.ndarray, " n"]:
    """Probability that each mitosis is atypical, (N,); NaN for candidates below the threshold.

    Raises:
        UserError: the slide is too coarse for the crops that the head was trained on.
    """
    atypical = np.full(len(found.scores), np.nan)
    mitoses = np.flatnonzero(found.scores >= threshold)
    if len(mitoses):
        with open_slide(job.path, job.mpp, job.coordinates.geometry.tile_pattern) as slide:
            places = [(x, y) for x, y in found.points[mitoses].tolist()]
            crops = read_crops(slide, places, head)
        atypical[mitoses] = score_crops(head, crops)
    return atypical
