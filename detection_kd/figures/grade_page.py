"""One HTML page on graded slides: what each consists of, its score, and where the grades are.

The page needs no network and no other file; at most MOST_SLIDES slides are drawn on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detection_kd.whole_slides.grade_files import COLOURS, SlideGrade
from patch_encoder.region_page.slide_pictures import QUALITY, SlidePictures
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.figures import jpeg_uri
from wsi_common.files import write_text
from wsi_common.pages import fill_template

TEMPLATES = Path(__file__).parents[1] / "templates"
MOST_SLIDES = 24  # those with the highest grades
PICTURE = 760  # px


@dataclass(frozen=True)
class GradedSlideView:
    """A slide on the page, as it is and in the grades' colours; empty where it cannot be read."""

    grade: SlideGrade
    plain: str
    painted: str


def write_page(
    output: Path, jobs: Sequence[SlideJob], grades: Sequence[SlideGrade], title: str
) -> Path:
    """Write `<output>/grades.html`; returns its path.

    Args:
        output: with `maps/` of the slides.
        jobs, grades: of the slides that are done.
        title: of the page.
    """
    order = sorted(range(len(grades)), key=lambda i: grades[i].shares[::-1], reverse=True)
    files = {job.slide_id: job.path for job in jobs}
    maps = {job.slide_id: output / "maps" / f"{job.slide_id}.tiff" for job in jobs}
    mpps = {grade.slide_id: grade.mpp for grade in grades}
    pattern = jobs[0].coordinates.geometry.tile_pattern if jobs else ""
    with SlidePictures(files, mpps, pattern) as plain, SlidePictures(maps, {}) as painted:
        views = [
            GradedSlideView(grades[i], *(_draw(p, grades[i].slide_id) for p in (plain, painted)))
            for i in order[:MOST_SLIDES]
        ]
    names = grades[0].grades
    html = fill_template(
        TEMPLATES,
        "grades.html.j2",
        title=title,
        grades=sorted(grades, key=lambda grade: grade.slide_id),
        views=views,
        legend=[(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)],
    )
    write_text(output / "grades.html", html)
    return output / "grades.html"


def _draw(pictures: SlidePictures, slide_id: str) -> str:
    seen = pictures.overview(slide_id, PICTURE)
    return "" if seen is None else jpeg_uri(seen[0], QUALITY)
