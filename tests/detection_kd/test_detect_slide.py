"""Detection on whole slides: seams, coordinates, formats, resuming, broken tiles; with a detector
that finds dark squares.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from detection_kd import detect_slide
from detection_kd.models.deformable_transformer import Detections
from detection_kd.whole_slides.slide_detections import (
    FoundBoxes,
    TileDetections,
    choose_own,
    find_own_part,
    merge_detections,
)
from patch_encoder import tile_slides
from patch_encoder.tiles.coordinates import (
    Coordinates,
    TileGeometry,
    read_coordinates,
    write_coordinates,
)
from tests.helpers import forget_slides, write_pyramid
from wsi_common.cli import run

# (x, y, side) in level-0 px: inside a tile, on a vertical seam, on a crossing of seams, at the
# slide's corner
SQUARES = [(20, 30, 20), (118, 40, 24), (180, 182, 20), (480, 486, 22)]

DESCRIPTION = {
    "categories": ["other", "square"],
    "field": {"mpp": 0.5, "side": 128, "resize": 1.0},
    "operating_point": {"min_score": 0.3, "f1": 1.0},
}


class DarkSquares(nn.Module):
    """Stands for a detector: boxes around dark spots, class 1, the larger the surer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, padding: Tensor) -> Detections:
        height, width = images.shape[-2:]
        logits, boxes = (
            torch.full((1, len(images), 9, 2), -9.0),
            torch.full((1, len(images), 9, 4), 0.5),
        )
        for index, image in enumerate(images):
            spots = ndimage.find_objects(ndimage.label(image.mean(0).numpy() < -1)[0])
            for number, (rows, columns) in enumerate(spots):
                size = (columns.stop - columns.start, rows.stop - rows.start)
                centre = (columns.start + size[0] / 2, rows.start + size[1] / 2)
                extent = torch.tensor([width, height, width, height])
                boxes[0, index, number] = torch.tensor([*centre, *size]) / extent
                logits[0, index, number, 1] = min(size) / 10
        return Detections(logits, boxes)


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide with four dark squares, tiles of 128 px that overlap by a quarter, and the stand-in
    detector.
    """
    pixels = np.full((512, 512, 3), (200, 120, 190), np.uint8)
    for x, y, side in SQUARES:
        pixels[y : y + side, x : x + side] = 20
    write_pyramid(tmp_path / "slides" / "S1.tiff", pixels)
    write_pyramid(
        tmp_path / "slides" / "S2.tiff", np.full((512, 512, 3), (200, 120, 190), np.uint8)
    )
    keys = [
        f"slides={tmp_path}/slides",
        f"output={tmp_path}/tiles",
        "tile_size=128",
        "target_mpp=0.5",
        "overlap=0.25",
    ]
    assert run(tile_slides.main, tile_slides.Config, [*keys, "min_tissue=0", "workers=0"]) == 0
    (tmp_path / "detector.pt").write_bytes(b"weights")
    monkeypatch.setattr(
        detect_slide,
        "open_detector",
        lambda path: (DarkSquares(), dict(DESCRIPTION)),
    )
    return tmp_path


def detect(cohort: Path, *changes: str) -> int:
    keys = [
        f"slides={cohort}/slides",
        f"coords={cohort}/tiles",
        f"output={cohort}/found",
        f"detector={cohort}/detector.pt",
    ]
    fixed = ["workers=0", "device=cpu", "precision=fp32", "batch_size=3"]
    return run(detect_slide.main, detect_slide.Config, [*keys, *fixed, *changes])


def read(cohort: Path, slide: str = "S1") -> dict:
    return json.loads((cohort / "found" / "coco" / f"{slide}.json").read_text())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_square_is_found_once_and_whole_in_level_0_pixels(cohort: Path, scale: float) -> None:
    assert detect(cohort, f"scale={scale}") == 0
    document = read(cohort)
    found = sorted(entry["bbox"] for entry in document["annotations"])
    expected = sorted([x, y, side, side] for x, y, side in SQUARES)
    assert np.allclose(found, expected, atol=2 / scale - 1)
    assert {entry["category_id"] for entry in document["annotations"]} == {2}
    assert document["images"] == [{"id": 1, "file_name": "S1.tiff", "width": 512, "height": 512}]
    assert [category["name"] for category in document["categories"]] == ["other", "square"]
    assert read(cohort, "S2")["annotations"] == []


def test_geojson_has_what_qupath_reads(cohort: Path) -> None:
    assert detect(cohort) == 0
    content = json.loads((cohort / "found" / "geojson" / "S1.geojson").read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == len(SQUARES)
    corners = set()
    for feature in content["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]
        corners.add(tuple(round(v) for v in ring[0]))
        properties = feature["properties"]
        assert (
            properties["objectType"] == "detection"
            and properties["classification"]["name"] == "square"
        )
        assert all(0 <= c <= 255 for c in properties["classification"]["color"])
        assert 0 < properties["measurements"]["score"] <= 1
    assert corners == {(x, y) for x, y, _ in SQUARES}


def test_geojson_counts_from_the_bounds_of_the_slide_as_qupath_does(cohort: Path) -> None:
    path = cohort / "tiles" / "coords" / "S1.h5"
    tiles = read_coordinates(path)
    geometry = replace(tiles.geometry, bounds_x=15, bounds_y=20)
    write_coordinates(path, replace(tiles, geometry=geometry))
    assert detect(cohort) == 0
    content = json.loads((cohort / "found" / "geojson" / "S1.geojson").read_text())
    corners = {
        tuple(round(v) for v in feature["geometry"]["coordinates"][0][0])
        for feature in content["features"]
    }
    assert corners == {(x - 15, y - 20) for x, y, _ in SQUARES}
    found = {tuple(round(v) for v in entry["bbox"][:2]) for entry in read(cohort)["annotations"]}
    assert found == {(x, y) for x, y, _ in SQUARES}  # COCO counts from the corner of the slide


def test_auto_takes_scale_and_score_from_the_checkpoint(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    field = {"mpp": 0.25, "side": 256, "resize": 0.25}  # 1 um per pixel: tiles have 0.5
    trained = DESCRIPTION | {"field": field, "operating_point": {"min_score": 0.42, "f1": 1.0}}
    monkeypatch.setattr(detect_slide, "open_detector", lambda path: (DarkSquares(), trained))
    assert detect(cohort) == 0
    info = read(cohort)["info"]
    assert (info["scale"], info["min_score"]) == (0.5, 0.42) and "larger" not in caplog.text
    assert len(read(cohort)["annotations"]) == len(SQUARES)
    assert detect(cohort, "scale=1.0", f"output={cohort}/other") == 0
    assert "scale=1: the detector's training says 0.5 (images of 256 px at 0.25 um" in caplog.text


def test_a_checkpoint_that_states_nothing_is_one_line_each(
    cohort: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = {"categories": DESCRIPTION["categories"]}
    monkeypatch.setattr(detect_slide, "open_detector", lambda path: (DarkSquares(), bare))
    assert detect(cohort, "min_score=0.3") == 2
    error = capsys.readouterr().err
    assert "error: scale=auto: expected a checkpoint that states the resolution" in error
    assert error.count("\n") == 1 and not (cohort / "found").exists()
    assert detect(cohort, "scale=1") == 0
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and lines[0].startswith("min_score=auto: the checkpoint states no score")
    assert read(cohort)["info"]["min_score"] == 0.3


def test_finished_slides_are_left_alone_and_other_settings_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(cohort) == 0
    path = cohort / "found" / "coco" / "S1.json"
    whole, stamp = path.read_bytes(), path.stat().st_mtime_ns
    (
        cohort / "found" / "coco" / "S2.json"
    ).unlink()  # a run that was killed before its second slide
    assert detect(cohort) == 0
    assert path.stat().st_mtime_ns == stamp and read(cohort, "S2")["annotations"] == []
    assert detect(cohort, "min_score=0.5") == 2
    assert "min_score 0.3 -> 0.5" in capsys.readouterr().err
    assert detect(cohort, "overwrite=true") == 0 and path.read_bytes() == whole
    (cohort / "detector.pt").write_bytes(b"others")
    assert detect(cohort) == 2


def test_detections_of_another_slide_are_not_done(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(cohort) == 0
    path = cohort / "found" / "coco" / "S2.json"
    before = path.stat().st_mtime_ns
    (cohort / "slides" / "S2.tiff").rename(cohort / "slides" / "moved")
    (cohort / "slides" / "deep").mkdir()
    (cohort / "slides" / "moved").rename(cohort / "slides" / "deep" / "S2.tiff")
    assert detect(cohort) == 0 and path.stat().st_mtime_ns == before
    document = json.loads(path.read_text())
    document["info"]["slide_fingerprint"] = "0" * 64
    path.write_text(json.dumps(document))
    assert detect(cohort) == 2
    assert "slide_fingerprint '0000" in capsys.readouterr().err


def test_a_broken_tile_fails_its_slide_only(cohort: Path) -> None:
    folder = cohort / "slides" / "S3"
    folder.mkdir()
    for row in range(2):
        Image.new("RGB", (128, 128), (200, 120, 190)).save(folder / f"{row}_0.png")
    labels = cohort / "labels.csv"
    labels.write_text("case_id,slide_id,label,mpp\nA,S1,pos,0.5\nB,S3,neg,0.5\n")
    keys = [
        f"slides={cohort}/slides",
        f"output={cohort}/more",
        f"labels={labels}",
        "tile_size=128",
        "target_mpp=0.5",
    ]
    assert (
        run(
            tile_slides.main,
            tile_slides.Config,
            [*keys, "overlap=0.25", "min_tissue=0", "workers=0"],
        )
        == 0
    )
    forget_slides(cohort / "more")
    (folder / "1_0.png").write_bytes(b"broken")
    assert detect(cohort, f"coords={cohort}/more", f"labels={labels}") == 1
    assert len(read(cohort)["annotations"]) == len(SQUARES)
    assert not (cohort / "found" / "coco" / "S3.json").exists()
    assert "S3,detect_slide" in (cohort / "found" / "failures.csv").read_text()


def grid(side: int, overlap: float, corners: list[tuple[int, int]]) -> Coordinates:
    geometry = TileGeometry("s", side, side, 0, side, 0.5, 0.5, overlap, 1000, 1000)
    return Coordinates(np.array(corners), geometry)


def test_own_parts_share_the_plane_without_gap_or_overlap() -> None:
    coordinates = grid(100, 0.25, [(0, 0), (75, 0), (150, 0), (0, 75)])
    parts = find_own_part(coordinates) + np.tile(coordinates.coords, 2)
    assert parts[0, 2] == parts[1, 0] and parts[1, 2] == parts[2, 0] and parts[0, 3] == parts[3, 1]
    assert parts[0, 2] == 75 + 12  # the middle of the overlap from 75 to 100
    assert parts[0, 0] < 0 and parts[2, 2] > 250  # no neighbour, no limit


def whole_tile(found: FoundBoxes) -> TileDetections:
    return TileDetections(found, np.zeros(len(found.scores), bool))


def merge_views(lesions: np.ndarray, jitter: float, seed: int) -> FoundBoxes:
    """Detections of a slide of 4 x 4 tiles of 400 px that overlap by 100 px; each tile sees each
    lesion on its own, its corners up to `jitter` / 2 px off, cut at the tile's edges.
    """
    rng = np.random.default_rng(seed)
    coordinates = grid(400, 0.25, [(300 * c, 300 * r) for r in range(4) for c in range(4)])
    tiles = []
    for corner, part in zip(coordinates.coords, find_own_part(coordinates), strict=True):
        boxes = lesions - np.tile(corner, 2)
        boxes = boxes + rng.uniform(-jitter / 2, jitter / 2, boxes.shape)
        clipped = np.clip(boxes, 0, 400)
        seen = (clipped[:, 2:] - clipped[:, :2] > 0.5 * (boxes[:, 2:] - boxes[:, :2])).all(1)
        boxes = clipped[seen].astype(np.float32)
        scores = rng.uniform(0.3, 1, len(boxes)).astype(np.float32)
        found, shared = choose_own(FoundBoxes(boxes, scores, np.zeros(len(boxes), int)), part)
        moved = found.boxes + np.tile(corner, 2).astype(np.float32)
        tiles.append(TileDetections(found._replace(boxes=moved), shared))
    return merge_detections(tiles, 0.5)


@pytest.mark.parametrize("side", [12, 30, 90])
@pytest.mark.parametrize("jitter", [0, 1, 2, 4])
def test_every_lesion_is_reported_once_whatever_two_tiles_make_of_it(
    jitter: float, side: int
) -> None:
    line = np.arange(50, 1250 - side, side + 17)
    centres_of_all = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    for seed in range(2):
        shift = np.random.default_rng(seed).uniform(0, side, 2)
        lesions = np.tile(centres_of_all + shift, 2) + np.array([-1, -1, 1, 1]) * side / 2
        found = merge_views(lesions, jitter, seed)
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        distance = np.abs(centres[:, None] - (lesions[None, :, :2] + side / 2)).max(-1)
        reports = np.bincount(distance.argmin(1), minlength=len(lesions))
        assert (reports == 1).all(), f"{(reports == 0).sum()} lost, {(reports > 1).sum()} doubled"


def test_two_lesions_that_one_tile_tells_apart_stay_two() -> None:
    pair = np.array([[40, 40, 80, 80], [55, 40, 70, 80]], np.float32)  # one within the other
    scores = [np.float32([0.9, 0.6]), np.float32([0.8, 0.7])]
    near_a_cut = np.array([True, True])
    tiles = [
        TileDetections(FoundBoxes(pair + 2 * i, score, np.zeros(2, int)), near_a_cut)
        for i, score in enumerate(scores)
    ]
    assert merge_detections(tiles, 0.5).scores.tolist() == pytest.approx([0.9, 0.6])


def test_suppression_is_within_a_class() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 1, 10, 11]], np.float32)
    kept = merge_detections(
        [
            whole_tile(FoundBoxes(boxes[:2], np.float32([0.5, 0.9]), np.array([0, 0]))),
            whole_tile(FoundBoxes(boxes[2:], np.float32([0.4]), np.array([1]))),
        ],
        0.5,
    )
    assert kept.scores.tolist() == pytest.approx([0.9, 0.4]) and kept.labels.tolist() == [0, 1]
    assert merge_detections([], 0.5).boxes.shape == (0, 4)
