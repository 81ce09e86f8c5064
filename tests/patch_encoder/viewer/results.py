"""A small slide and results of all stages on it, written by the stages' own writers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detection_kd.evaluation.hot_spot import HotSpot
from detection_kd.whole_slides.grade_files import SlideGrade, make_regions
from detection_kd.whole_slides.grade_map import make_grade_map
from detection_kd.whole_slides.mitosis_candidates import Candidates
from detection_kd.whole_slides.mitosis_count import MitosisCount
from detection_kd.whole_slides.mitosis_files import write_points_geojson
from detection_kd.whole_slides.slide_detections import FoundBoxes, write_geojson
from mil.heatmaps.scores import TileScores, write_scores
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry
from patch_encoder.tissue.geojson import write_geojson as write_outlines
from patch_encoder.tissue.outlines import Outline
from tests.helpers import draw_slide, write_pyramid
from wsi_common.files import write_csv, write_json

SIDE, MPP = 1300, 0.5  # of the slide: px, um per px
TILE = 100  # px of a scored tile
BOXES = np.array([[260.0, 300, 380, 420], [820, 700, 900, 760]], np.float32)
FIGURES = np.array([[650.0, 1100.0], [200, 1100]])
SLIDE_IDS = ("S1", "S2 odd #1 50%")


def write_results(root: Path) -> dict[str, str]:
    """Write slides, labels and results below `root`; returns the keys of the slide page."""
    for slide_id in SLIDE_IDS:
        write_pyramid(root / "slides" / f"{slide_id}.tiff", draw_slide(SIDE), MPP)
        write_layers(root, slide_id)
    rows = [{"slide_id": name, "mitoses": 1, "per_mm2": 2.5} for name in SLIDE_IDS]
    write_csv(root / "mitoses" / "counts.csv", ["slide_id", "mitoses", "per_mm2"], rows)
    folders = ("slides", "outlines", "heat", "detections", "mitoses", "grade_maps")
    return {name: str(root / name) for name in folders}


def write_layers(root: Path, slide_id: str) -> None:
    """What each stage leaves of one slide."""
    square = Outline(np.array([[100, 100], [700, 100], [700, 700], [100, 700]]))
    write_outlines(root / "outlines" / f"{slide_id}.geojson", [square], MPP, (0, 0))
    found = FoundBoxes(BOXES, np.array([0.9, 0.4], np.float32), np.array([0, 1]))
    name = f"{slide_id}.geojson"
    write_geojson(root / "detections" / "geojson" / name, found, ["lesion", "other"], (0, 0))
    spot = HotSpot(1, (325.0, 550.0), "rectangle", 0.01, 0.01)
    count = MitosisCount(slide_id, "", "", MPP, 0.4, 0.5, 1, (spot,))
    candidates = Candidates(FIGURES, np.array([0.8, 0.3]))
    write_points_geojson(root / "mitoses" / "geojson" / name, candidates, count, (0, 0))
    write_grades(root / "grade_maps" / "geojson" / name, slide_id)
    write_heat(root / "heat", slide_id)


def write_grades(path: Path, slide_id: str) -> None:
    """Two grades side by side at the right border."""
    corners = np.array([[1000, 0], [1100, 0]])
    made = make_grade_map(
        corners, 100, (SIDE, SIDE), np.array([[0.9, 0.1], [0.2, 0.8]]), np.ones(2, bool)
    )
    grade = SlideGrade(slide_id, MPP, ("NC", "G3"), (0.1, 0.1), 2, 0)
    write_json(path, make_regions(made, grade, (0, 0)))


def write_heat(folder: Path, slide_id: str) -> None:
    """Scores of a block of 5 x 5 tiles, and the part of the record that a page reads."""
    places = np.arange(5) * TILE + 700
    corners = np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)
    geometry = TileGeometry(slide_id, TILE, TILE, 0, TILE, MPP, MPP, 0.0, SIDE, SIDE)
    attention = np.arange(1.0, 26) / np.arange(1, 26).sum()
    scores = TileScores(
        Coordinates(corners, geometry), attention, None, "attention", "", np.array([0.3, 0.7])
    )
    write_scores(folder / "scores" / f"{slide_id}.csv", scores)
    record = {"side": TILE, "width": SIDE, "height": SIDE, "shown": "attention", "case": "C1"}
    record |= {"label": "tumour", "predicted": "tumour", "predictions": {"tumour": 0.7}}
    write_json(folder / "records" / f"{slide_id}.json", record)
