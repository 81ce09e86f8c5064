"""Mitoses on slides and fields: seams, formats, counts, resuming, failures; with a localiser that
finds dark spots.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection_kd import detect_mitosis
from detection_kd.evaluation.midog_json import read_midog_json
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import FieldStainKeys, build_field_stain, normalise_tiles
from detection_kd.mitosis_sets.coco_points import read_coco_points
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import AnnotatedField, PointSet
from detection_kd.models.atypical import (
    AtypicalHead,
    CropFeatures,
    load_atypical,
    read_crops,
    score_crops,
)
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
from detection_kd.whole_slides.detected_points import read_detections
from detection_kd.whole_slides.mitosis_candidates import CandidateCollector, Candidates
from detection_kd.whole_slides.mitosis_count import measure_area
from patch_encoder import tile_slides
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry
from tests.detection_kd.mitosis_pictures import (
    DESCRIPTION,
    DarkSpots,
    paint_spots,
    paint_tissue,
    write_spotted_slide,
)
from tests.html_pages import PageChecker
from wsi_common.checkpoint import save_checkpoint
from wsi_common.cli import run

# (x, y) in px: inside a tile, on a vertical seam, on a crossing of seams, near the slide's corners
SPOTS = [(20, 30), (118, 40), (110, 110), (300, 296), (7, 7), (604, 504), (450, 60), (478, 60)]
FAINT = [(200, 400)]


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A field with eight mitoses and a faint candidate, an empty one, and the stand-in localiser."""
    pixels = paint_spots(610, 510, SPOTS)
    for x, y in FAINT:
        pixels[y - 6 : y + 6, x - 6 : x + 6] = 150
    (tmp_path / "slides").mkdir()
    Image.fromarray(pixels).save(tmp_path / "slides" / "S1.png", dpi=(50800, 50800))
    write_spotted_slide(tmp_path / "slides" / "S2.tiff", 512, 512, [])
    (tmp_path / "cases.csv").write_text(
        "file,case,scanner,mpp\nS1.png,A,scanner one,0.5\nS2.tiff,B,scanner two,\n"
    )
    (tmp_path / "localiser.pt").write_bytes(b"weights")
    monkeypatch.setattr(
        detect_mitosis, "load_localiser", lambda path: (DarkSpots(), dict(DESCRIPTION))
    )
    return tmp_path


def detect(cohort: Path, *changes: str) -> int:
    keys = [
        f"slides={cohort}/slides",
        f"cases={cohort}/cases.csv",
        f"localiser={cohort}/localiser.pt",
        f"output={cohort}/found",
    ]
    labels = cohort / "labels.csv"
    labels.write_text("case_id,slide_id,label\nA,S1,x\nB,S2,y\n")
    fixed = ["workers=0", "device=cpu", "precision=fp32", "batch_size=3", "tile_size=128"]
    return run(
        detect_mitosis.main, detect_mitosis.Config, [*keys, f"labels={labels}", *fixed, *changes]
    )


def read(cohort: Path, slide: str = "S1") -> dict:
    return json.loads((cohort / "found" / "coco" / f"{slide}.json").read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def require_same_places(found: np.ndarray, expected: list[tuple[int, int]]) -> None:
    """Each of both has one of the other within 4 px, the side of a cell."""
    far = np.abs(np.array(found)[:, None] - np.array(expected)[None]).max(-1)
    assert len(found) == len(expected), sorted(map(tuple, found))
    assert (far.min(0) <= 4).all() and (far.min(1) <= 4).all()


@pytest.mark.parametrize(("side", "overlap"), [(96, 0.25), (128, 0.6), (200, 0.1), (1024, 0.25)])
def test_every_mitosis_of_a_field_is_counted_once_whatever_the_tiles(
    cohort: Path, side: int, overlap: float
) -> None:
    assert detect(cohort, f"overlap={overlap}", f"tile_size={side}") == 0
    found, mitoses = read_midog_json(cohort / "found" / "midog" / "S1.json")
    require_same_places(found.points[mitoses] / 0.5, SPOTS)
    require_same_places(found.points[~mitoses] / 0.5, FAINT)
    assert read(cohort, "S2")["annotations"] == []


def test_tiles_of_tissue_find_the_same(cohort: Path) -> None:
    keys = [f"slides={cohort}/slides", f"output={cohort}/tiles", "tile_size=128"]
    keys += [f"labels={cohort}/labels.csv", "pad=true", "min_tissue=0", "workers=0", "mpp=0.5"]
    assert detect(cohort) == 0
    options = [*keys, "target_mpp=0.5", "overlap=0.25"]
    assert run(tile_slides.main, tile_slides.Config, options) == 0
    assert detect(cohort, f"coords={cohort}/tiles", f"output={cohort}/other") == 0
    found, mitoses = read_midog_json(cohort / "other" / "midog" / "S1.json")
    require_same_places(found.points[mitoses] / 0.5, SPOTS)


def test_all_files_of_a_slide_say_the_same(cohort: Path) -> None:
    assert detect(cohort) == 0
    folder = cohort / "found"
    rows = read_rows(folder / "points" / "S1.csv")
    points = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    assert [row["class"] for row in rows] == ["mitotic figure"] * 8 + ["non-mitotic figure"]
    found, _ = read_midog_json(folder / "midog" / "S1.json")
    np.testing.assert_allclose(found.points, points * 0.5, rtol=1e-12)
    assert found.scores.tolist() == [float(row["score"]) for row in rows]
    (field,) = read_coco_points(folder / "coco" / "S1.json", None, 0)
    np.testing.assert_allclose(field.points, points, atol=0.01)
    assert field.labels.tolist() == [0] * 8 + [1]
    content = json.loads((folder / "geojson" / "S1.geojson").read_text())
    shapes = [feature["geometry"]["type"] for feature in content["features"]]
    assert content["type"] == "FeatureCollection" and shapes == ["Point"] * 9 + ["Polygon"] * 2
    for feature, row in zip(content["features"], rows, strict=False):
        assert feature["geometry"]["coordinates"] == pytest.approx(
            [float(row["x"]), float(row["y"])], abs=0.01
        )
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"]["name"] == row["class"]
        assert properties["measurements"]["score"] == pytest.approx(float(row["score"]), abs=1e-5)
    hot_spot = content["features"][-2]
    (ring,) = hot_spot["geometry"]["coordinates"]
    assert ring[0] == ring[-1] and hot_spot["properties"]["objectType"] == "annotation"
    assert hot_spot["properties"]["measurements"]["mitoses"] == 8


def test_counts_say_how_many_per_mm2_and_in_the_hot_spots(cohort: Path) -> None:
    assert detect(cohort, "hot_spot_mm2=[0.01,2.0]", "hot_spot_shape=rectangle") == 0
    first, second = read_rows(cohort / "found" / "counts.csv")
    area = 610 * 510 * 0.25e-6
    assert (first["slide_id"], first["case"], first["scanner"]) == ("S1", "A", "scanner one")
    assert float(first["area_mm2"]) == pytest.approx(area, abs=1e-6) and first["mitoses"] == "8"
    assert float(first["per_mm2"]) == pytest.approx(8 / area, rel=1e-4)
    # 115 x 87 um hold the three spots around (82, 60) px, or the four near the upper left corner
    assert first["hot_spot_0.01_mm2"] == "4" and first["hot_spot_2_mm2"] == "8"
    assert float(first["hot_spot_2_mm2_per_mm2"]) == pytest.approx(8 / area, rel=1e-3)
    assert second["mitoses"] == second["hot_spot_2_mm2"] == "0"


def test_a_second_opinion_says_which_mitoses_are_atypical(cohort: Path) -> None:
    """A head with random weights; the files, the counts and the page say what it says."""
    torch.manual_seed(0)
    keys = LocaliserKeys(trunk="small", init="random")
    features = CropFeatures(WeakLocaliser(keys))
    head = AtypicalHead(features, nn.Linear(features.dim, 2), mpp=0.5)
    path = cohort / "head.pt"
    save_checkpoint(path, model=head.state_dict(), config=head.describe(), epoch=1)
    assert detect(cohort, f"atypical={path}") == 0
    found = json.loads((cohort / "found" / "geojson" / "S1.geojson").read_text())["features"]
    points = [item["properties"] for item in found if item["geometry"]["type"] == "Point"]
    with (cohort / "found" / "points" / "S1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["atypical"] != "" for row in rows if row["class"] == "mitotic figure"} == {True}
    assert {row["atypical"] for row in rows if row["class"] != "mitotic figure"} == {""}
    told = [item["measurements"].get("atypical") for item in points]
    assert [value is not None for value in told] == [row["atypical"] != "" for row in rows]
    with open_slide(cohort / "slides" / "S1.png", 0.5) as slide:
        places = [(float(row["x"]), float(row["y"])) for row in rows if row["atypical"]]
        wanted = score_crops(load_atypical(path), read_crops(slide, places, head))
    given = [float(row["atypical"]) for row in rows if row["atypical"]]
    np.testing.assert_allclose(given, wanted, atol=1e-6)
    assert read(cohort)["count"]["atypical"] == int((wanted > 0.5).sum())
    assert "<th>atypical</th>" in (cohort / "found" / "mitoses.html").read_text()
    with (cohort / "found" / "counts.csv").open() as stream:
        assert [row["atypical"] for row in csv.DictReader(stream)][1] == "0", "an empty field"
    assert detect(cohort) == 2, "without the second opinion these are other results"


def test_the_page_is_whole_and_sorts_candidates_by_doubt(cohort: Path) -> None:
    assert detect(cohort, "gallery=5", "title=Two fields") == 0
    html = (cohort / "found" / "mitoses.html").read_text()
    page = PageChecker()
    page.feed(html)
    assert not page.open and "http" not in html.replace("http-equiv", "")
    assert len(page.images["candidate in S1"]) == 5 and len(page.images["mitoses of S2"]) == 1
    shown = [float(part.split("<")[0]) for part in html.split('class="score">')[1:]]
    doubts = [abs(np.log(score / (1 - score))) for score in np.clip(shown, 1e-3, 1 - 1e-3)]
    assert doubts == sorted(doubts) and shown[0] < 0.5, "the faint one first"
    # 610 x 510 px of 0.5 um are less than either hot spot
    for text in ("Two fields", "scanner one", "scanner two", "(of which the slide has 0.08)"):
        assert text in html


def test_finished_slides_are_left_alone_and_other_settings_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(cohort) == 0
    files = {path: path.read_bytes() for path in (cohort / "found").rglob("*") if path.is_file()}
    stamp = (cohort / "found" / "coco" / "S1.json").stat().st_mtime_ns
    for folder in ("coco", "midog"):  # a run that was killed before its second slide
        (cohort / "found" / folder / "S2.json").unlink()
    assert detect(cohort) == 0
    assert (cohort / "found" / "coco" / "S1.json").stat().st_mtime_ns == stamp
    assert {path: path.read_bytes() for path in files} == files
    assert detect(cohort, "min_score=0.9") == 2
    assert "min_score 0.5 -> 0.9" in capsys.readouterr().err
    (cohort / "localiser.pt").write_bytes(b"others")
    assert detect(cohort) == 2 and detect(cohort, "overwrite=true") == 0


def test_processes_share_a_cohort_and_the_last_run_writes_the_summary(cohort: Path) -> None:
    assert detect(cohort) == 0
    whole = (cohort / "found" / "counts.csv").read_bytes()
    for part in ("shard=1/2", "shard=2/2"):
        assert detect(cohort, part, f"output={cohort}/parts") == 0
    assert not (cohort / "parts" / "counts.csv").exists()
    assert detect(cohort, f"output={cohort}/parts") == 0
    assert (cohort / "parts" / "counts.csv").read_bytes() == whole


def test_fields_of_one_name_are_named_with_their_folders_as_annotated_sets_do(cohort: Path) -> None:
    """TUPAC16 has `01/01.tif` and `02/01.tif`, and a region that one case alone has."""
    images, labels = cohort / "tupac", cohort / "mitoses_ground_truth"
    for case, region in (("01", "01"), ("02", "01"), ("02", "02")):
        path = images / case / f"{region}.tif"
        write_spotted_slide(path, 200, 150, [(60, 40)] * (region == "01"))
        (labels / case).mkdir(parents=True, exist_ok=True)
        (labels / case / f"{region}.csv").write_text("40,60\n" * (region == "01"))
    keys = [f"slides={images}", f"localiser={cohort}/localiser.pt", f"output={cohort}/found"]
    keys += ["workers=0", "device=cpu", "tile_size=128"]
    assert run(detect_mitosis.main, detect_mitosis.Config, keys) == 0
    data = MitosisSetKeys(
        annotations=str(labels), images=str(images), format="tupac16", mpp=0.5, first_index=0
    )
    fields = read_point_set(data)
    detected = read_detections(cohort / "found", fields)
    assert list(detected) == ["01_01", "02_01", "02_02"]
    assert [int(item.mitoses.sum()) for item in detected.values()] == [1, 1, 0]


def test_bad_fields_fail_alone(cohort: Path) -> None:
    Image.fromarray(paint_spots(300, 300, [])).save(cohort / "slides" / "S3.png")  # no um per px
    (cohort / "slides" / "S4.tiff").write_bytes(b"II*\0broken")
    keys = [f"slides={cohort}/slides", f"localiser={cohort}/localiser.pt"]
    keys += [f"output={cohort}/found", "workers=0", "device=cpu", "tile_size=128"]
    table = "file,scanner\nS1.png,one\n"
    (cohort / "some.csv").write_text(table)
    labels = cohort / "all.csv"
    labels.write_text("case_id,slide_id,label\nA,S1,x\nB,S2,y\nC,S3,x\nD,S4,x\nE,S5,x\n")
    options = [*keys, f"labels={labels}", f"cases={cohort}/some.csv"]
    assert run(detect_mitosis.main, detect_mitosis.Config, options) == 1
    failures = {row["slide"]: row["error"] for row in read_rows(cohort / "found" / "failures.csv")}
    assert set(failures) == {"S3", "S4", "S5"} and "set mpp=" in failures["S3"]
    assert len(read_rows(cohort / "found" / "counts.csv")) == 2


def test_what_overwriting_could_not_replace_is_not_in_the_counts(cohort: Path) -> None:
    assert detect(cohort) == 0
    path = cohort / "slides" / "S2.tiff"
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : third + 4000] = bytes(4000)  # it opens, and has tiles that cannot be read
    path.write_bytes(content)
    assert detect(cohort, "overwrite=true", "min_score=0.9") == 1
    failures = read_rows(cohort / "found" / "failures.csv")
    assert [row["slide"] for row in failures] == ["S2"]
    assert read(cohort, "S2")["count"]["threshold"] == 0.5, "still that of the first run"
    assert [row["slide_id"] for row in read_rows(cohort / "found" / "counts.csv")] == ["S1"]


@pytest.mark.parametrize("key", ["hot_spot_mm2=[]", "hot_spot_mm2=[-1]", "overlap=1.0"])
def test_impossible_keys_are_one_line(
    cohort: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(cohort, key) == 2
    error = capsys.readouterr().err
    assert key.split("=")[0] in error and error.count("\n") == 1


def make_job(corners: list[tuple[int, int]], side: int = 100) -> SlideJob:
    geometry = TileGeometry("s", side, side, 0, side, 0.5, 0.5, 0.25, 250, 180)
    return SlideJob("s", Path("s"), Coordinates(np.array(corners), geometry), 0.5)


def test_the_area_counts_overlaps_once_and_nothing_beyond_the_slide() -> None:
    assert measure_area(make_job([(0, 0)])) == 100 * 100
    assert measure_area(make_job([(0, 0), (75, 0)])) == 175 * 100
    assert measure_area(make_job([(0, 0), (60, 40)])) == 2 * 100 * 100 - 40 * 60
    assert measure_area(make_job([(200, 120)])) == 50 * 60


def test_candidates_at_the_rim_of_a_tile_give_way_to_the_tile_that_sees_them_whole() -> None:
    collector = CandidateCollector(make_job([(0, 0), (75, 0)]).coordinates, radius=5)
    # the divide is at x = 87.5; within 5 px of it both tiles keep what they see
    collector.add(Candidates(np.array([[80.0, 50], [90, 50], [95, 50]]), np.array([0.9, 0.8, 0.7])))
    collector.add(Candidates(np.array([[3.0, 50], [17, 50], [40, 50]]), np.array([0.9, 0.85, 0.6])))
    found = collector.merge()
    assert found.points.tolist() == [[80, 50], [92, 50], [115, 50]]
    assert found.scores.tolist() == [0.9, 0.85, 0.6]


@pytest.mark.parametrize("side", [64, 112])
def test_a_checkpoint_alone_says_stain_and_resolution(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field of .25 um per px, a localiser of .5 with a stain: tiles are read at .5, and have the
    colours that a training on that field would give them, whatever their side.
    """
    pixels = paint_tissue(400, 300)
    Image.fromarray(pixels).save(tmp_path / "S1.png", dpi=(101600, 101600))
    stain = build_field_stain(FieldStainKeys(stain="macenko"))
    torch.manual_seed(0)
    model = WeakLocaliser(LocaliserKeys(trunk="small", init="random"))
    described = {"side": 64, "mpp": 0.5, "threshold": 0.3, "stain": stain.describe()}
    save_checkpoint(
        tmp_path / "best.pt", model=model.state_dict(), config=model.describe() | described, epoch=1
    )
    seen: list[torch.Tensor] = []
    detect_candidates = detect_mitosis.detect_candidates

    def note(network: nn.Module, scale: float, settings: object, tiles: torch.Tensor, jobs: list):
        assert scale == 1.0
        seen.append(tiles.clone())
        return detect_candidates(network, scale, settings, tiles, jobs)

    monkeypatch.setattr(detect_mitosis, "detect_candidates", note)
    keys = [f"slides={tmp_path}/S1.png", f"localiser={tmp_path}/best.pt", f"tile_size={side}"]
    keys += [f"output={tmp_path}/found", "workers=0", "device=cpu", "overlap=0.0"]
    assert run(detect_mitosis.main, detect_mitosis.Config, keys) == 0
    none = np.zeros((0, 2))
    field = AnnotatedField("S1", tmp_path / "S1.png", "c", "", 0.25, none, np.zeros(0, np.int64))
    trained = normalise_tiles(FieldTiles(PointSet((field,)), 64, 0.5), stain)
    plain = FieldTiles(PointSet((field,)), side, 0.5)
    tiles = [plain.read(tile) for tile in range(len(plain))]
    assert trained.stain is not None
    expected = np.stack([trained.stain(tile, 0) for tile in tiles])
    found = torch.cat(seen).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, expected)
    assert (found != np.stack(tiles)).any()
    assert read_rows(tmp_path / "found" / "counts.csv")[0]["mpp"] == "0.25"
