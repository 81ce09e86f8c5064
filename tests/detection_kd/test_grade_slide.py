"""Grading of whole slides: every tile at its place, the score of the map, two speeds, resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detection_kd.fields.tiling import place_tiles
from detection_kd.grade_slide import Config, main
from detection_kd.models.low_resolution import GradingKeys, GradingNetwork, PatchScale
from detection_kd.whole_slides import tile_grades, tile_pass
from detection_kd.whole_slides.grade_files import COLOURS, OPACITY, find_patterns
from detection_kd.whole_slides.grade_map import NOTHING
from patch_encoder.slides import open_slide
from patch_encoder.tiles.grid import make_tile_geometry, read_tile
from patch_encoder.tissue.geojson import read_geojson
from patch_encoder.tissue.outlines import fill_outlines
from tests.helpers import write_pyramid
from wsi_common.checkpoint import save_checkpoint
from wsi_common.config import load_config
from wsi_common.errors import UserError

GRADES = ("NC", "G3", "G4", "G5")
SIDE, WIDTH, HEIGHT = 32, 300, 212
# a pixel's red says its grade; all of them are tissue
REDS = np.array([40, 100, 160, 215])


def write_network(path: Path, ratio: int, mpp: float | None = 1.0) -> Path:
    """A checkpoint of a network for patches of SIDE px."""
    keys = GradingKeys("small", "random", norm="layer", normalised=False)
    network = GradingNetwork(keys, GRADES, PatchScale(SIDE, ratio, mpp))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    save_checkpoint(path, model=network.state_dict(), config=network.describe(), epoch=1)
    return path


def call_by_colour(network: GradingNetwork, pixels: torch.Tensor) -> torch.Tensor:
    """Logits by the mean red; ratio 1 is sure, a higher ratio sure of the lowest grade alone."""
    red = 255 * pixels[:, 0].mean((1, 2))[:, None]
    logits = -((red - torch.tensor(REDS)) ** 2) / 300
    return logits if network.scale.ratio == 1 else logits / 3


@pytest.fixture(autouse=True)
def colour_networks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """Networks grade by colour; returns (ratio, shape) of every batch."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def forward(self: GradingNetwork, pixels: torch.Tensor, level: int = -1) -> object:
        seen.append((self.scale.ratio, tuple(pixels.shape)))
        output = type("Output", (), {})()
        output.logits = call_by_colour(self, pixels)
        return output

    monkeypatch.setattr(GradingNetwork, "forward", forward)
    return seen


def draw_slide() -> np.ndarray:
    """Four upright stripes of the grades, the lower half of the second and all of the last third
    of the last one glass.
    """
    pixels = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    pixels[..., 0] = REDS[np.minimum(np.arange(WIDTH) // 75, 3)]
    pixels[HEIGHT // 2 :, 75:150] = 255
    return pixels


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """A slide of 1 um per px, a student at ratio 4 and its teacher."""
    write_pyramid(tmp_path / "slides" / "biopsy.tiff", draw_slide(), 1.0)
    return {
        "slides": tmp_path / "slides",
        "grader": write_network(tmp_path / "student.pt", 4),
        "teacher": write_network(tmp_path / "teacher.pt", 1),
        "output": tmp_path / "graded",
    }


def grade(paths: dict[str, Path], *settings: str) -> int:
    given = [f"{name}={paths[name]}" for name in ("slides", "grader", "output")]
    given += ["device=cpu", "precision=fp32", "workers=0", "batch_size=16", *settings]
    return main(load_config(Config, given))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def expect_map() -> np.ndarray:
    """Grades pixel by pixel, from tiles of the full-resolution pixels."""
    pixels, corners = draw_slide().astype(float), place_tiles(WIDTH, HEIGHT, SIDE, SIDE // 2)
    sums, tiles = np.zeros((4, HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH), int)
    for x, y in corners:
        tile = pixels[y : y + SIDE, x : x + SIDE]
        if (tile.min(-1) < 230).mean() < 0.3:
            continue
        logits = -((tile[..., 0].mean() - REDS) ** 2) / 900
        own = np.exp(logits - logits.max())
        sums[:, y : y + SIDE, x : x + SIDE] += (own / own.sum())[:, None, None]
        tiles[y : y + SIDE, x : x + SIDE] += 1
    return np.where(tiles > 0, sums.argmax(0), NOTHING)


def test_grades_are_at_their_places_to_the_pixel(paths: dict[str, Path]) -> None:
    """The table of tiles, regions of the GeoJSON and areas, against means over single pixels; the
    student reads tiles of a quarter of the side.
    """
    assert grade(paths) == 0
    expected = expect_map()
    found = np.full((HEIGHT, WIDTH), NOTHING)
    for shape in read_geojson(paths["output"] / "geojson" / "biopsy.geojson", (0, 0)):
        found[fill_outlines([shape.outline], (HEIGHT, WIDTH))] = GRADES.index(shape.name)
    assert (found == expected).all()
    row = read_rows(paths["output"] / "grades.csv")[0]
    tissue = (expected != NOTHING).sum()
    assert float(row["area_mm2"]) == pytest.approx(tissue / 1e6, abs=1e-6)
    for index, name in enumerate(GRADES):
        share = (expected == index).sum() / tissue
        assert float(row[f"share_{name}"]) == pytest.approx(share, abs=1e-6)
    # G4 and G5 cover as much; of the others the highest is the secondary one
    assert (row["gleason"], row["isup_group"]) == ("9", "5")


def test_the_map_is_a_pyramid_in_the_slides_resolution(paths: dict[str, Path]) -> None:
    grade(paths)
    with open_slide(paths["output"] / "maps" / "biopsy.tiff") as slide:
        assert (slide.width, slide.height, slide.mpp) == (WIDTH, HEIGHT, pytest.approx(1.0))
        painted = slide.read(0, 0, HEIGHT, 0)[:HEIGHT, :HEIGHT].astype(int)
    plain = draw_slide()[:, :HEIGHT].astype(int)
    glass = expect_map()[:, :HEIGHT] == NOTHING
    assert glass.any() and (painted[glass] == plain[glass]).all()
    # the colour of the grade alone, darker or lighter as the slide is
    colours = np.array(COLOURS)[expect_map()[:, :HEIGHT][~glass]]
    tints = painted[~glass] - OPACITY * colours
    assert np.ptp(tints, axis=1).max() <= 1


def test_a_slide_may_have_any_name(paths: dict[str, Path]) -> None:
    """The pyramid's comment has letters that ASCII has not."""
    (paths["slides"] / "biopsy.tiff").rename(paths["slides"] / "Größe 1 µm.tiff")
    assert grade(paths) == 0
    with open_slide(paths["output"] / "maps" / "Größe 1 µm.tiff") as slide:
        assert (slide.width, slide.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mpp", [1.0, 0.5])
def test_a_student_sees_means_of_the_pixels_that_its_teacher_sees(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mpp: float
) -> None:
    """A slide without levels; what is finer than the teacher's view is brought to it first."""
    pixels = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), np.uint8)
    path = paths["slides"] / "biopsy.tiff"
    write_pyramid(path, pixels, mpp, levels=(1,))
    seen: list[np.ndarray] = []
    original = tile_grades.grade_tiles

    def spy(network: GradingNetwork, settings: object, tiles: torch.Tensor, jobs: object) -> object:
        seen.extend(tiles.numpy())
        return original(network, settings, tiles, jobs)

    monkeypatch.setattr("detection_kd.grade_slide.grade_tiles", spy)
    assert grade(paths) == 0
    with open_slide(path) as slide:
        corners = place_tiles(WIDTH, HEIGHT, round(SIDE / mpp), round(SIDE / mpp) // 2)
        views = [read_tile(slide, make_tile_geometry(slide, SIDE, 1.0), *c) for c in corners]
    means = np.stack(views).reshape(-1, SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))
    assert np.abs(means.transpose(0, 3, 1, 2) - np.stack(seen)).max() <= 0.5


def test_the_page_shows_every_slide_and_its_score(paths: dict[str, Path]) -> None:
    grade(paths, "title=Biopsies of today")
    html = (paths["output"] / "grades.html").read_text()
    assert "Biopsies of today" in html and html.count("data:image/jpeg") == 2
    assert "ISUP group 5" in html


def test_a_pass_on_a_cpu_keeps_the_memory_of_its_activations(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped anew in every batch, they cost half as much again (lite0 on 16 tiles of 160 px)."""
    asked: list[bool] = []
    monkeypatch.setattr(tile_pass, "reuse_large_blocks", lambda: asked.append(True))
    assert grade(paths) == 0 and asked


@pytest.mark.parametrize("workers", [0, 2])
def test_the_teacher_sees_the_least_sure_share_alone(
    paths: dict[str, Path], colour_networks: list, workers: int
) -> None:
    two = [f"teacher_checkpoint={paths['teacher']}", "teacher_share=0.2", f"workers={workers}"]
    assert grade(paths, *two) == 0
    rows = read_rows(paths["output"] / "tiles" / "biopsy.csv")
    by_teacher = [row for row in rows if row["network"] == "teacher"]
    assert len(by_teacher) == int(0.2 * len(rows)) > 0
    seen = {ratio: sum(s[0] for r, s in colour_networks if r == ratio) for ratio in (1, 4)}
    assert seen[1] == len(by_teacher) and seen[4] >= len(rows)
    shapes = {(ratio, shape[1:]) for ratio, shape in colour_networks}
    assert shapes == {(1, (3, SIDE, SIDE)), (4, (3, SIDE // 4, SIDE // 4))}
    # of all tiles the student was least sure where stripes meet
    pixels = draw_slide().astype(float)
    for row in by_teacher:
        x, y = int(row["x"]), int(row["y"])
        red = pixels[y : y + SIDE, x : x + SIDE, 0].mean()
        logits = -((red - REDS) ** 2) / 300
        own = np.exp(logits - logits.max())
        assert float(row[row["grade"]]) == pytest.approx((own / own.sum()).max(), abs=2e-2)


def test_a_finished_slide_is_left_alone_and_a_stale_one_refused(paths: dict[str, Path]) -> None:
    grade(paths)
    document = paths["output"] / "grades" / "biopsy.json"
    before = document.stat().st_mtime_ns
    assert grade(paths) == 0 and document.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="min_tissue"):
        grade(paths, "min_tissue=0.6")
    assert grade(paths, "min_tissue=0.6", "overwrite=true") == 0
    assert json.loads(document.read_text())["info"]["min_tissue"] == 0.6


def test_a_slide_that_cannot_be_graded_stops_no_other(paths: dict[str, Path]) -> None:
    (paths["slides"] / "broken.tiff").write_bytes(b"no slide")
    write_pyramid(paths["slides"] / "unknown.tiff", draw_slide(), None)
    assert grade(paths) == 1
    failures = read_rows(paths["output"] / "failures.csv")
    assert {row["slide"] for row in failures} == {"broken", "unknown"}
    assert [row["slide_id"] for row in read_rows(paths["output"] / "grades.csv")] == ["biopsy"]


def test_a_slide_of_glass_has_no_tumour(paths: dict[str, Path]) -> None:
    write_pyramid(paths["slides"] / "biopsy.tiff", np.full((96, 96, 3), 255, np.uint8), 1.0)
    two = [f"teacher_checkpoint={paths['teacher']}"]
    assert grade(paths, *two) == 0
    row = read_rows(paths["output"] / "grades.csv")[0]
    assert (row["area_mm2"], row["gleason"], row["tiles"]) == ("0.0", "0", "0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["min_tissue=1.5"], "min_tissue=1.5: expected 0 to 1"),
        (["teacher_share=-0.1"], "teacher_share=-0.1: expected 0 to 1"),
        (["least_share=0.5"], "least_share=0.5: expected 0 to 0.333"),
    ],
)
def test_shares_that_are_none_are_refused(
    paths: dict[str, Path], settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        grade(paths, *settings)


def test_networks_that_do_not_go_together_are_refused(paths: dict[str, Path]) -> None:
    write_network(paths["grader"], 4, mpp=None)
    with pytest.raises(UserError, match=r"expected the um per px of its patches, found none"):
        grade(paths)
    write_network(paths["grader"], 4)
    write_network(paths["teacher"], 1, mpp=0.5)
    with pytest.raises(UserError, match=r"expected grades NC,G3,G4,G5 of 32 px at 1 um"):
        grade(paths, f"teacher_checkpoint={paths['teacher']}")


@pytest.mark.parametrize(
    ("grades", "patterns"),
    [
        (GRADES, {1: 3, 2: 4, 3: 5}),
        (("benign", "3", "4", "5"), {1: 3, 2: 4, 3: 5}),
        (("benign", "Gleason 3", "GP4"), {1: 3, 2: 4}),
        (("Normal", "OSCC"), {}),
        (("G3", "G4", "G5"), {}),  # no benign grade: everything would be tumour
    ],
)
def test_grades_are_patterns_by_their_names(
    grades: tuple[str, ...], patterns: dict[int, int]
) -> None:
    assert find_patterns(grades) == patterns


def test_tiles_of_another_size_are_refused(paths: dict[str, Path]) -> None:
    """`coords` of tile_slides have to cover what a patch covers."""
    from detection_kd.whole_slides.whole_fields import FieldTiling, find_field_jobs
    from patch_encoder.cohort.failures import Failures
    from patch_encoder.cohort.selection import Selection
    from patch_encoder.cohort.shards import Shard

    tiling = FieldTiling(2 * SIDE, 1.0, 0.5, None, {})
    failures = Failures("test", "")
    (job,) = find_field_jobs(str(paths["slides"]), "", tiling, failures, Shard(), Selection())
    with pytest.raises(
        UserError, match=r"expected tiles of 32 level-0 px, 32 px at 1 um, found 64"
    ):
        tile_grades.read_at(job, PatchScale(SIDE, 4, 1.0))
