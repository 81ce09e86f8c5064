"""The files of one slide's grades: a table of its tiles, regions for QuPath, the slide in the
grades' colours as a pyramid, and the document that says what they were made with.

The document is written last: where it is, the slide is done.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from detection_kd.evaluation.gleason import score_biopsy
from detection_kd.grading.two_speed import measure_doubt
from detection_kd.whole_slides.grade_map import NOTHING, GradeMap
from detection_kd.whole_slides.tile_grades import TileGrades
from patch_encoder.demo.pyramid import write_pyramid
from patch_encoder.slides import Slide
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiles.coordinates import SlideJob
from patch_encoder.tissue.outlines import compute_signed_area, trace_outlines
from wsi_common.files import read_json, write_csv, write_json

COLOURS = ((0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (136, 34, 85))
"""From the lowest grade to the highest; further ones begin again."""
OPACITY = 0.45
MAP_SIDE = 8192
"""Most px of the longer side of a pyramid."""
PATTERN = re.compile(r"(?:G|GP|Gleason ?)?([345])", re.IGNORECASE)


@dataclass(frozen=True)
class SlideGrade:
    """What a report says about one slide.

    Attributes:
        slide_id: of it.
        mpp: um per level-0 px.
        grades: names, from the lowest to the highest.
        areas_mm2: of each grade.
        tiles: with tissue.
        by_teacher: of these, those that the teacher graded.
        score: Gleason score and ISUP group in words; empty where grades are no Gleason patterns.
        primary, secondary, isup_group: the same as numbers, 0 without tumour.
    """

    slide_id: str
    mpp: float
    grades: tuple[str, ...]
    areas_mm2: tuple[float, ...]
    tiles: int
    by_teacher: int
    score: str = ""
    primary: int = 0
    secondary: int = 0
    isup_group: int = 0

    @property
    def area_mm2(self) -> float:
        """Of all tiles that were graded, glass between the tissue in them included."""
        return sum(self.areas_mm2)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the area that was graded, each grade's."""
        return tuple(area / self.area_mm2 if self.area_mm2 else 0.0 for area in self.areas_mm2)

    def row(self) -> dict[str, Any]:
        """The line of `grades.csv`."""
        values: dict[str, Any] = {"slide_id": self.slide_id, "area_mm2": round(self.area_mm2, 6)}
        for grade, share in zip(self.grades, self.shares, strict=True):
            values[f"share_{grade}"] = round(share, 6)
        if self.score:
            values |= {"primary": self.primary, "secondary": self.secondary}
            values |= {"gleason": self.primary + self.secondary, "isup_group": self.isup_group}
        return values | {"tiles": self.tiles, "tiles_by_teacher": self.by_teacher}


def find_patterns(grades: Sequence[str]) -> dict[int, int]:
    """Index of a grade -> its Gleason pattern, where all grades but the first one have one (NC, G3,
    G4, G5 have); else empty.
    """
    matches = [PATTERN.fullmatch(name) for name in grades[1:]]
    if not all(matches) or PATTERN.fullmatch(grades[0]):
        return {}
    return {index: int(match[1]) for index, match in enumerate(matches, 1) if match}


def summarise_slide(
    job: SlideJob,
    mpp: float,
    grades: Sequence[str],
    grade_map: GradeMap,
    kept: np.ndarray,
    found: TileGrades,
    least_share: float,
) -> SlideGrade:
    """Areas, and where the grades are Gleason patterns the score.

    Args:
        job, mpp: the slide.
        grades: names.
        grade_map, kept, found: its map, the tiles with tissue, and all tiles.
        least_share: of the tumour, below which a pattern is taken for an error.
    """
    areas = tuple((grade_map.measure_areas() * (mpp**2 / 1e6)).tolist())
    counts = (int(kept.sum()), int((found.by_teacher & kept).sum()))
    plain = SlideGrade(job.slide_id, mpp, tuple(grades), areas, *counts)
    patterns = find_patterns(grades)
    if not patterns:
        return plain
    own = {pattern: areas[index] for index, pattern in patterns.items()}
    score = score_biopsy(own, least_share)
    numbers = {"primary": score.primary, "secondary": score.secondary}
    numbers |= {"isup_group": score.isup_group}
    return SlideGrade(job.slide_id, mpp, tuple(grades), areas, *counts, str(score), **numbers)


def document_path(output: Path, slide_id: str) -> Path:
    """The document of a slide, which is written last."""
    return output / "grades" / f"{slide_id}.json"


def read_slide_grade(output: Path, slide_id: str) -> SlideGrade:
    """The summary of a finished slide."""
    values = read_json(document_path(output, slide_id), "grades of a slide")["grade"]
    lists = {name: tuple(values[name]) for name in ("grades", "areas_mm2")}
    return SlideGrade(**(values | lists))


def write_slide_files(
    output: Path,
    slide: Slide,
    job: SlideJob,
    found: TileGrades,
    kept: np.ndarray,
    grade_map: GradeMap,
    grade: SlideGrade,
    info: Mapping[str, Any],
) -> None:
    """Write all files of a slide, which is open."""
    name = job.slide_id
    write_tiles(output / "tiles" / f"{name}.csv", job, found, kept, grade.grades)
    regions = make_regions(grade_map, grade, slide.bounds)
    write_json(output / "geojson" / f"{name}.geojson", regions)
    picture = paint_slide(slide, grade_map, MAP_SIDE)
    path = output / "maps" / f"{name}.tiff"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(path, picture, grade.mpp * slide.width / picture.shape[1], f"grades of {name}")
    write_json(document_path(output, name), {"info": dict(info), "grade": asdict(grade)})


def write_tiles(
    path: Path, job: SlideJob, found: TileGrades, kept: np.ndarray, grades: Sequence[str]
) -> None:
    """One line per tile with tissue: where it is (level-0 px), what it is called, who says so, how
    doubtful the answer is, and the probability of each grade.
    """
    doubts = measure_doubt(found.probabilities)
    rows = []
    for number in np.flatnonzero(kept).tolist():
        x, y = job.coordinates.coords[number].tolist()
        own = found.probabilities[number]
        network = "teacher" if found.by_teacher[number] else "student"
        row = {"x": x, "y": y, "grade": grades[int(own.argmax())], "network": network}
        row |= {"doubt": round(float(doubts[number]), 5)}
        rows.append(row | {name: round(value, 6) for name, value in zip(grades, own.tolist())})
    write_csv(path, ("x", "y", "grade", "network", "doubt", *grades), rows)


def make_regions(grade_map: GradeMap, grade: SlideGrade, bounds: tuple[int, int]) -> dict[str, Any]:
    """Connected regions of one grade as polygons, as QuPath imports them: level-0 px from the
    slide's `bounds` on.
    """
    features = []
    for index, name in enumerate(grade.grades):
        for outline in trace_outlines(grade_map.called == index):
            rings = [_place_ring(ring, grade_map) for ring in (outline.outer, *outline.holes)]
            areas = [abs(compute_signed_area(ring)) for ring in rings]
            area = (areas[0] - sum(areas[1:])) * grade.mpp**2 / 1e6
            closed = [(np.vstack([ring, ring[:1]]) - bounds).tolist() for ring in rings]
            about = {"name": name, "color": list(COLOURS[index % len(COLOURS)])}
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": closed},
                    "properties": {
                        "objectType": "annotation",
                        "name": f"{name} {area:.2f} mm2",
                        "classification": about,
                        "measurements": {"Area mm^2": round(area, 6)},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}


def _place_ring(ring: np.ndarray, grade_map: GradeMap) -> np.ndarray:
    """Corners of cells in level-0 px."""
    return np.stack([grade_map.x_edges[ring[:, 0]], grade_map.y_edges[ring[:, 1]]], axis=1)


def paint_slide(slide: Slide, grade_map: GradeMap, side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The slide with its longer side at most `side` px, and the grades' colours over its grey: over
    its own colours, green would be blue on dark nuclei.
    """
    picture = read_overview(slide, side).pixels
    height, width = picture.shape[:2]
    called = grade_map.paint((height, width), (slide.width / width, slide.height / height))
    colours = np.array(COLOURS)[np.maximum(called, 0) % len(COLOURS)]
    grey = picture.mean(axis=2, keepdims=True)
    mixed = (OPACITY * colours + (1 - OPACITY) * grey).round().astype(np.uint8)
    return np.where((called == NOTHING)[..., None], picture, mixed)
