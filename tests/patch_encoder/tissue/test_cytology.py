"""Cells on glass at any coverage; ink, bubbles, edges and dust; real pen marks; memory that does
not grow with the slide.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_level, read_overview
from patch_encoder.tissue.artefacts import (
    find_bubbles,
    find_dust,
    find_flat_areas,
    find_ink,
    find_ink_pixels,
    find_lines,
)
from patch_encoder.tissue.find import find_tissue
from patch_encoder.tissue.regions import fill_holes, filter_by_area
from patch_encoder.tissue.settings import INKS, TissueSettings
from tests.helpers import ROOT, draw_slide, write_pyramid
from tests.patch_encoder.tissue import glass

CELLS = TissueSettings(mpp=glass.MPP, closing=0.0, min_area=300.0)


def slide_of(path: Path, picture: np.ndarray, mpp: float = glass.MPP) -> Path:
    return write_pyramid(path, picture, mpp=mpp, levels=(1,))


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize(
    ("coverage", "least"), [(0.005, 0.7), (0.1, 0.7), (0.5, 0.8), (0.95, 0.95)]
)
def test_cells_are_found_whether_few_or_many(tmp_path: Path, coverage: float, least: float) -> None:
    picture, truth = glass.draw_cells(500, coverage)
    with open_slide(slide_of(tmp_path / "a.tiff", picture)) as slide:
        found = find_tissue(slide, "cytology", CELLS)
    assert overlap(found.mask, truth) > least
    assert found.mask[truth].mean() > 0.94
    assert not found.dropped["pen"].any()


def test_edges_ink_bubbles_dust_and_bad_light_are_no_cells(tmp_path: Path) -> None:
    picture, truth = glass.draw_cells(1000, 0.005)
    junk = {
        "line": glass.add_line(picture, (40, 0), (60, 999)),
        "other line": glass.add_line(picture, (0, 930), (999, 950)),
        "bubble": glass.add_bubble(picture, (700, 250), 90),
        "ink": glass.add_ink(picture, (200, 600), (450, 700), (40, 60, 190)),
        "dust": glass.add_dust(picture, 80),
        "mount": glass.add_mount(picture, 70),
    }
    with open_slide(slide_of(tmp_path / "a.tiff", picture)) as slide:
        found = find_tissue(slide, "cytology", CELLS)
    for name, where in junk.items():
        assert found.mask[where & ~truth].mean() < 0.02, name
    clean = truth & ~np.any(list(junk.values()), axis=0)
    assert found.mask[clean].mean() > 0.85, "only cells that touch one of them may go with it"
    assert found.dropped["pen"][junk["ink"]].mean() > 0.8
    assert found.dropped["artefact"][junk["bubble"]].mean() > 0.8


@pytest.mark.parametrize("ink", INKS)
def test_each_ink_is_told_apart_and_can_be_left_alone(ink: str) -> None:
    colour = {
        "blue": (60, 90, 200),
        "green": (40, 160, 130),
        "red": (200, 30, 40),
        "black": (40, 38, 42),
    }[ink]
    picture, _ = glass.draw_cells(400, 0.1)
    where = glass.add_ink(picture, (100, 100), (300, 300), colour)
    assert find_ink(picture, glass.MPP, [ink])[where].mean() > 0.95
    assert not find_ink(picture, glass.MPP, [other for other in INKS if other != ink]).any()
    assert not find_ink(picture, glass.MPP, []).any()
    assert not find_ink(picture, glass.MPP, [ink], width=900.0).any(), "narrower than a stroke"


REAL = [
    ("no-tissue-green-pen", "green", 0.6),
    ("tcga-green-pen", "green", 0.05),
    ("medium-nuclei-score-green-pen-level1", "green", 0.3),
    ("no-tissue-red-pen", "red", 0.2),
    ("tcga-red-pen", "red", 0.2),
    ("very-low-nuclei-score-red-pen-level1", "red", 0.2),
    ("wsi-blue-pen", "blue", 0.02),
]


@pytest.mark.parametrize(("name", "ink", "share"), REAL)
def test_real_pen_marks(real_data: Path, name: str, ink: str, share: float) -> None:
    picture = picture_of(real_data / "qc_tiles" / f"{name}.png")
    assert find_ink_pixels(picture, [ink]).mean() > share


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        factor = 1 if "wsi" in path.stem else 4
        return np.asarray(
            image.convert("RGB").resize(
                (image.width // factor, image.height // factor), Image.Resampling.BOX
            )
        )


def test_real_tissue_and_glass_are_no_ink(real_data: Path) -> None:
    names = [
        "almost-white-1",
        "almost-white-2",
        "low-nuclei-score-level0",
        "no-tissue",
        "no-tissue2",
        "no-tissue-line",
    ]
    names += [
        "tcga-lung-rgb",
        "tissue-level0-4302-10273-4814-10785",
        "tissue-level0-7352-11762-7864-12274",
    ]
    paths = [real_data / "qc_tiles" / f"{name}.png" for name in names]
    paths += sorted((real_data / "stain_targets").glob("*.png"))
    for path in paths:
        assert not find_ink(picture_of(path), 2.0, INKS, width=60.0).any(), path.name


def test_ink_is_cut_out_of_tissue_only_when_asked_for(tmp_path: Path) -> None:
    picture = draw_slide(512)
    where = glass.add_ink(picture, (100, 150), (250, 160), (40, 160, 130))
    with open_slide(slide_of(tmp_path / "a.tiff", picture, mpp=8.0)) as slide:
        for method in ("hsv_otsu", "clam"):
            plain, marked = TissueSettings(), TissueSettings(inks=list(INKS))
            plain.clam.a_t = marked.clam.a_t = 0.0
            assert find_tissue(slide, method, plain).mask[where].mean() > 0.9
            found = find_tissue(slide, method, marked)
            assert not found.mask[where].any()
            assert found.dropped["pen"][where].mean() > 0.9
            assert found.mask[260:350, 320:400].all(), "the other tissue stays"


def test_shapes_of_artefacts() -> None:
    y, x = np.mgrid[:200, :200]
    radius = np.hypot(x - 100, y - 100)
    ring, disc = (radius < 60) & (radius > 56), radius < 60
    assert (find_bubbles(ring, 4.0) == ring).all() and not find_bubbles(disc, 4.0).any()
    assert not find_bubbles(ring & (x > 100), 4.0).any() and not find_bubbles(ring, 1.0).any()
    line = np.abs(y - 0.2 * x - 20) < 2
    assert find_lines(line, 16.0).sum() > 0.95 * line.sum()
    assert not find_lines(np.abs(y - 100) < 20, 16.0).any(), "a thick bar is no line"
    assert (
        not find_lines(line, 16.0, length=0.0).any() and not find_lines(line & (x < 60), 16.0).any()
    )
    picture = np.full((200, 200, 3), 180, np.uint8)
    picture[:, :60] = np.random.default_rng(0).integers(100, 200, (200, 60, 3))
    flat = find_flat_areas(np.ones((200, 200), bool), picture, 8.0)
    assert flat[:, 80:].all() and not flat[:, :50].any()
    specks = np.zeros((200, 200), dtype=bool)
    specks[10:14, 10:14] = specks[50:54, 50:54] = specks[100:150, 100:150] = True
    od = np.full((200, 200, 3), 0.5, dtype=np.float32)
    od[50:54, 50:54, 0] = 0.1
    dust = find_dust(specks, od, 4.0)
    assert dust[10:14, 10:14].all() and dust.sum() == 16, "stained and large ones stay"


def test_areas_and_holes() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[1:9, 1:9] = mask[12:14, 12:14] = True
    mask[3:5, 3:6] = False
    assert filter_by_area(mask, 5.0).sum() == 58 and filter_by_area(mask, 4.0).sum() == 62
    assert (
        fill_holes(mask, 7.0).sum() == 68
        and fill_holes(mask, 6.0).sum() == 62
        and fill_holes(mask, 0.0).sum() == 62
    )
    assert fill_holes(~mask, 5.0)[12:14, 12:14].all()
    assert not filter_by_area(np.zeros((3, 3), bool), 0.0).any()


def test_holes_of_tissue_are_filled_up_to_min_hole(tmp_path: Path) -> None:
    picture = draw_slide(512)
    picture[150:158, 150:158] = 240
    with open_slide(slide_of(tmp_path / "a.tiff", picture, mpp=8.0)) as slide:
        settings = TissueSettings(median=8.0, closing=0.0)
        assert not find_tissue(slide, "hsv_otsu", settings).mask[152:156, 152:156].any()
        settings.min_hole = 64 * 64 + 1.0
        assert find_tissue(slide, "hsv_otsu", settings).mask[152:156, 152:156].all()


@pytest.mark.parametrize("shape", [(700, 530), (64, 1000)])
def test_overview_in_blocks_is_the_mean_of_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", picture, levels=(1, 2))
    monkeypatch.setattr("patch_encoder.slides.overview.BLOCK", 128)
    with open_slide(path) as slide:
        found = read_overview(slide, 100).pixels
        level = read_level(slide, 1).pixels
        half = np.asarray(
            Image.fromarray(picture).resize((shape[1] // 2, shape[0] // 2), Image.Resampling.BOX)
        )
        np.testing.assert_array_equal(level, half)
        expected = np.asarray(
            Image.fromarray(half).resize(found.shape[1::-1], Image.Resampling.BOX)
        )
        # a pixel on the border of two blocks may fall to either
        assert max(found.shape[:2]) == 100 and np.abs(found.astype(int) - expected).mean() < 0.5
        reduced = read_level(slide, 0, max_side=64).pixels
        assert abs(reduced.shape[0] * reduced.shape[1] / 64**2 - 1) < 0.05


def test_a_large_level_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patch_encoder.slides.overview.LARGE", 400)
    monkeypatch.setattr("patch_encoder.slides.overview.KEPT_SIDE", 256)
    with open_slide(write_pyramid(tmp_path / "a.tiff", draw_slide(512), levels=(1,))) as slide:
        plain, reads = slide.read, []
        monkeypatch.setattr(slide, "read", lambda *place: reads.append(place) or plain(*place))
        small, smaller = (read_overview(slide, side).pixels for side in (128, 64))
        assert len(reads) == 1 and small.shape == (128, 128, 3) and smaller.shape == (64, 64, 3)
        expected = np.asarray(
            Image.fromarray(draw_slide(512)).resize((128, 128), Image.Resampling.BOX)
        ).astype(int)
        assert np.abs(small - expected).max() <= 2


MEASURE = """
import sys
from wsi_common.memory import peak_memory
from patch_encoder.slides import open_slide
from patch_encoder.tissue.find import find_tissue
from patch_encoder.tissue.settings import TissueSettings
before = peak_memory()
with open_slide(sys.argv[1], 0.25) as slide:
    mask = find_tissue(slide, sys.argv[2], TissueSettings()).mask
print((peak_memory() - before) / 2**20, mask.mean())
"""


@pytest.mark.process
def test_memory_does_not_grow_with_a_slide_without_levels(tmp_path: Path) -> None:
    grown = []
    for side in (3072, 9216):  # 27 and 243 MiB of RGB

        def tiles(count: int = side // 512):
            middle = range(count // 3, 2 * count // 3)
            for row in range(count):
                for column in range(count):
                    colour = (
                        (170, 60, 140) if row in middle and column in middle else (240, 240, 240)
                    )
                    yield np.full((512, 512, 3), colour, dtype=np.uint8)

        path = tmp_path / f"{side}.tiff"
        layout = {
            "shape": (side, side, 3),
            "dtype": np.uint8,
            "tile": (512, 512),
            "compression": "jpeg",
            "photometric": "rgb",
        }
        tifffile.imwrite(path, tiles(), **layout)
        command = [sys.executable, "-c", MEASURE, str(path), "hsv_otsu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        mib, share = map(float, done.stdout.split())
        assert share == pytest.approx(1 / 9, abs=0.01)
        grown.append(mib)
    assert grown[1] < grown[0] + 30, f"{grown} MiB"
