"""One HTML page on the mitoses of slides and fields: how many and where, by scanner, and the
candidates that somebody should look at.

The page needs no network and no other file. Its size depends on the number of pictures, which is
bounded, and not on the number of slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from detection_kd.figures.mitosis_overview import draw_overview
from detection_kd.whole_slides.mitosis_count import MitosisCount
from detection_kd.whole_slides.mitosis_files import read_points
from patch_encoder.region_page.slide_pictures import QUALITY, SlidePictures
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.figures import jpeg_uri
from wsi_common.files import write_text
from wsi_common.pages import fill_template

TEMPLATES = Path(__file__).parents[1] / "templates"
MOST_OVERVIEWS = 12  # slides that are drawn, those with the densest hot spots
OVERVIEW, CROP = 900, 128  # px
CROP_UM = 32.0  # side of a candidate's picture
TINY = 1e-6  # from 0 and 1, for logits


@dataclass(frozen=True)
class SlideView:
    """A slide on the page; `uri` is empty where it cannot be read."""

    count: MitosisCount
    uri: str


@dataclass(frozen=True)
class CandidateView:
    """A candidate in the gallery: where it is (level-0 px), its score, whether it counts."""

    slide_id: str
    x: float
    y: float
    score: float
    mitosis: bool
    uri: str


@dataclass(frozen=True)
class ScannerRow:
    """The slides of one scanner together."""

    scanner: str
    slides: int
    area_mm2: float
    mitoses: int
    candidates: int
    median_hot_spot: float

    @property
    def per_mm2(self) -> float:
        return self.mitoses / self.area_mm2


@dataclass(frozen=True)
class ListedCandidates:
    """Candidates of all slides: number of the slide, position in level-0 px, score, and doubt: the
    distance of the score from the threshold, in logits.
    """

    slides: np.ndarray
    points: np.ndarray
    scores: np.ndarray
    doubts: np.ndarray


def write_page(
    output: Path, jobs: Sequence[SlideJob], counts: Sequence[MitosisCount], gallery: int, title: str
) -> Path:
    """Write `<output>/mitoses.html`; returns its path.

    Args:
        output: with the files of `mitosis_files`.
        jobs, counts: of the slides that are done.
        gallery: number of candidates that are shown.
        title: of the page.
    """
    listed = list_candidates(output, counts)
    files = {job.slide_id: job.path for job in jobs}
    mpps = {count.slide_id: count.mpp for count in counts}
    pattern = jobs[0].coordinates.geometry.tile_pattern if jobs else ""
    with SlidePictures(files, mpps, pattern) as pictures:
        densest = sorted(range(len(counts)), key=lambda i: -counts[i].hot_spots[0].per_mm2)
        views = [_view_slide(pictures, listed, counts, i) for i in densest[:MOST_OVERVIEWS]]
        shown = [
            _view_candidate(pictures, listed, counts, index)
            for index in np.argsort(listed.doubts, kind="stable")[:gallery].tolist()
        ]
        problems = pictures.problems
    html = fill_template(
        TEMPLATES,
        "mitoses.html.j2",
        title=title,
        counts=sorted(counts, key=lambda count: count.slide_id),
        views=views,
        scanners=group_scanners(counts, listed),
        candidates=shown,
        total=len(listed.scores),
        crop_um=CROP_UM,
        problems=problems,
    )
    write_text(output / "mitoses.html", html)
    return output / "mitoses.html"


def list_candidates(output: Path, counts: Sequence[MitosisCount]) -> ListedCandidates:
    """All candidates of the finished slides."""
    slides, points, scores, doubts = [], [np.zeros((0, 2))], [np.zeros(0)], [np.zeros(0)]
    for number, count in enumerate(counts):
        found = read_points(output, count.slide_id, count.mpp)
        slides += [number] * len(found.scores)
        points.append(found.points)
        scores.append(found.scores)
        doubts.append(np.abs(_logit(found.scores) - _logit(np.array(count.threshold))))
    return ListedCandidates(
        np.array(slides, np.int64), *(np.concatenate(part) for part in (points, scores, doubts))
    )


def _logit(scores: np.ndarray) -> np.ndarray:
    inside = np.clip(scores, TINY, 1 - TINY)
    return np.log(inside / (1 - inside))


def group_scanners(counts: Sequence[MitosisCount], listed: ListedCandidates) -> list[ScannerRow]:
    """One row per scanner, by name; slides of unknown scanners together."""
    rows = []
    for scanner in sorted({count.scanner for count in counts}):
        chosen = [index for index, count in enumerate(counts) if count.scanner == scanner]
        group = [counts[index] for index in chosen]
        rows.append(
            ScannerRow(
                scanner,
                len(group),
                sum(count.area_mm2 for count in group),
                sum(count.mitoses for count in group),
                int(np.isin(listed.slides, chosen).sum()),
                median(count.hot_spots[0].count for count in group),
            )
        )
    return rows


def _view_slide(
    pictures: SlidePictures,
    listed: ListedCandidates,
    counts: Sequence[MitosisCount],
    number: int,
) -> SlideView:
    count = counts[number]
    seen = pictures.overview(count.slide_id, OVERVIEW)
    if seen is None:
        return SlideView(count, "")
    overview, scale = seen
    mitoses = (listed.slides == number) & (listed.scores >= count.threshold)
    points_um = listed.points[mitoses] * count.mpp
    drawn = draw_overview(overview, count.mpp / scale, points_um, list(count.hot_spots))
    return SlideView(count, jpeg_uri(drawn, QUALITY))


def _view_candidate(
    pictures: SlidePictures, listed: ListedCandidates, counts: Sequence[MitosisCount], index: int
) -> CandidateView:
    count = counts[listed.slides[index]]
    (x, y), score = listed.points[index].tolist(), float(listed.scores[index])
    side = max(1, round(CROP_UM / count.mpp))
    corner = (round(x - side / 2), round(y - side / 2))
    uri = pictures.crop(count.slide_id, corner, side, CROP)
    return CandidateView(count.slide_id, x, y, score, score >= count.threshold, uri)
