"""Heatmaps at known pixels, percentile ranks by hand, galleries in order, and a pyramid that
OpenSlide opens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from matplotlib import colormaps
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from mil.heatmaps.drawing import (
    Heat,
    add_frame,
    blend,
    draw_outlines,
    make_colour_table,
    make_heat_layer,
    make_value_map,
)
from mil.heatmaps.figures import (
    bin_answers,
    count_confusion,
    draw_roc_by_class,
    measure_calibration,
    pool_runs,
    wilson,
)
from mil.heatmaps.gallery import choose_tiles, format_value, write_gallery
from mil.heatmaps.pages import describe_scale
from mil.heatmaps.pyramid import choose_downsample, write_heat_pyramid
from mil.heatmaps.scores import TileScores, compute_percentile_ranks
from mil.heatmaps.settings import Drawing, check_drawing, choose_picture_side
from mil.heatmaps.slide import count_tiles_for_half, make_heat
from mil.tasks.classification import Classification, Predictions
from mil.tasks.ordinal import Ordinal
from patch_encoder.slides import open_slide
from patch_encoder.slides.base import Slide
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry
from patch_encoder.viz.captions import choose_round_length, format_length, load_caption_font
from wsi_common.errors import UserError


def picture_slide(folder: Path, pixels: np.ndarray, mpp: float) -> Slide:
    """A slide of one level; its picture is written to the folder."""
    Image.fromarray(pixels).save(folder / "picture.png")
    return open_slide(folder / "picture.png", mpp)


def heat(coords: list[list[int]], values: list[float], side: int, alpha: float = 0.5) -> Heat:
    return Heat(
        np.array(coords), np.array(values), side, "0", "100", "percentile of attention", alpha=alpha
    )


def scores(values: list[float], shown: str = "attention", side: int = 16) -> TileScores:
    count = len(values)
    coords = np.stack([np.arange(count) % 4, np.arange(count) // 4], axis=1) * side
    geometry = TileGeometry(
        "s", side, side, 0, side, 0.5, 0.5, 0.0, 4 * side, -(-count // 4) * side
    )
    alone = None if shown == "attention" else np.array(values)
    name = "" if shown == "risk" else "pos"  # a risk is of no class
    return TileScores(
        Coordinates(coords, geometry), np.array(values), alone, shown, name, np.array([0.4, 0.6])
    )


def test_values_are_averaged_where_tiles_overlap() -> None:
    coords = np.array([[0, 0], [4, 0], [20, 20]])
    values, covered = make_value_map(
        coords, np.array([0.2, 0.8, 1.0]), 8, (1.0, 1.0), (0, 0, 32, 30)
    )
    assert (
        values.shape == (30, 32)
        and values[0, 3] == pytest.approx(0.2)
        and values[7, 4] == pytest.approx(0.5)
    )
    assert (
        values[0, 8] == pytest.approx(0.8)
        and not covered[0, 12]
        and not covered[8, 0]
        and covered[20, 20]
    )
    assert covered.sum() == 12 * 8 + 64 and (values[~covered] == 0).all()


def test_parts_of_a_map_are_the_map_and_equal_a_loop_over_tiles() -> None:
    generator = np.random.default_rng(0)
    coords, values, side, scale = (
        generator.integers(0, 300, (60, 2)),
        generator.random(60),
        37,
        (0.31, 0.29),
    )
    whole, covered = make_value_map(coords, values, side, scale, (0, 0, 100, 96))
    total, count = np.zeros((96, 100)), np.zeros((96, 100))
    y, x = np.mgrid[:96, :100] + 0.5  # centres of pixels
    for (left, top), value in zip(coords, values, strict=True):
        inside = (
            (x >= left * scale[0])
            & (x < (left + side) * scale[0])
            & (y >= top * scale[1])
            & (y < (top + side) * scale[1])
        )
        total, count = total + inside * value, count + inside
    np.testing.assert_array_equal(covered, count > 0)
    np.testing.assert_allclose(whole[covered], total[covered] / count[covered], atol=1e-12)
    part, _ = make_value_map(coords, values, side, scale, (30, 40, 50, 20))
    np.testing.assert_allclose(part, whole[40:60, 30:80], atol=1e-12)
    assert not make_value_map(coords, values, side, scale, (500, 500, 8, 8))[1].any()


def test_a_tile_smaller_than_a_pixel_still_shows() -> None:
    values, covered = make_value_map(
        np.array([[205, 105]]), np.array([0.7]), 2, (0.01, 0.01), (0, 0, 5, 4)
    )
    assert covered.sum() == 1 and values[1, 2] == pytest.approx(0.7)


def test_colours_at_known_pixels() -> None:
    picture = np.full((20, 30, 3), 200, dtype=np.uint8)
    drawn = blend(picture, heat([[0, 0], [10, 0]], [0.0, 1.0], 10), (1.0, 1.0))
    low, high = (np.array(colormaps["viridis"](end)[:3]) * 255 for end in (0, 255))
    np.testing.assert_allclose(drawn[5, 5], 100 + low / 2, atol=1)
    np.testing.assert_allclose(drawn[9, 19], 100 + high / 2, atol=1)
    assert (drawn[10:] == 200).all() and (drawn[:, 20:] == 200).all() and (picture == 200).all()
    layer = np.asarray(make_heat_layer(heat([[0, 0]], [1.0], 10), (30, 20), (1.0, 1.0)))
    assert (layer[..., 3] == 255).sum() == 100 and (
        layer[0, 0, :3] == make_colour_table("viridis")[255]
    ).all()


def test_percentile_ranks_by_hand() -> None:
    assert compute_percentile_ranks(np.array([0.1, 0.4, 0.2, 0.3])).tolist() == [25, 100, 50, 75]
    assert compute_percentile_ranks(np.array([0.0, 0.0, 0.0, 0.9])).tolist() == [50, 50, 50, 100]
    assert compute_percentile_ranks(np.array([1.0])).tolist() == [100]


def test_what_the_colours_mean() -> None:
    given = scores([0.1, 0.2, 0.3, 0.4])
    ranks = make_heat(given, Drawing())
    assert ranks.values.tolist() == [0.25, 0.5, 0.75, 1.0] and (ranks.low, ranks.high) == (
        "0",
        "100",
    )
    raw = make_heat(given, Drawing(scale="raw"))
    np.testing.assert_allclose(raw.values, [0.25, 0.5, 0.75, 1.0])
    assert raw.high == "40 %"
    alone = make_heat(scores([0.1, 0.9], "probability"), Drawing(scale="raw"))
    assert alone.values.tolist() == [0.1, 0.9] and alone.high == "1" and "pos" in alone.name
    risk = make_heat(scores([-2.0, 0.0, 2.0], "risk"), Drawing(scale="raw"))
    assert risk.values.tolist() == [0.0, 0.5, 1.0] and (risk.low, risk.high, risk.name) == (
        "-2",
        "2",
        "risk, tile alone",
    )
    assert (make_heat(scores([1.5, 1.5], "risk"), Drawing(scale="raw")).values == 0).all()
    assert (
        count_tiles_for_half(np.array([0.1, 0.3, 0.2, 0.4])) == 2
        and count_tiles_for_half(np.array([0.5, 0.5])) == 1
    )


def test_top_and_low_tiles_in_order() -> None:
    chosen = choose_tiles(scores([0.1, 0.3, 0.05, 0.3, 0.25]), 3, 4)
    assert [(tile.kind, tile.rank, tile.tile) for tile in chosen] == [
        ("top", 1, 1),
        ("top", 2, 3),
        ("top", 3, 4),
        ("low", 1, 2),
        ("low", 2, 0),
    ]
    assert (chosen[2].x, chosen[2].y, chosen[2].file) == (0, 16, "top_03_x0_y16.jpg") and chosen[
        0
    ].percentile == 90
    assert (
        format_value(0.1234, "attention") == "12.3 %"
        and format_value(0.1234, "probability") == "0.123"
    )
    assert format_value(-1.23456, "risk") == "-1.23"


def test_gallery_shows_the_tiles_of_the_slide(tmp_path: Path) -> None:
    pixels = np.full((32, 64, 3), 255, dtype=np.uint8)
    for index in range(8):
        x, y = index % 4 * 16, index // 4 * 16
        pixels[y : y + 16, x : x + 16] = 25 * index
    given = scores([0.05, 0.1, 0.15, 0.2, 0.3, 0.1, 0.06, 0.04])
    chosen = choose_tiles(given, 2, 1)
    write_gallery(tmp_path, picture_slide(tmp_path, pixels, mpp=0.5), given, chosen, "s")
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir()) == [
        "low_01_x48_y16.jpg",
        "top_01_x0_y16.jpg",
        "top_02_x48_y0.jpg",
    ]
    shades = [np.asarray(Image.open(tmp_path / "tiles" / tile.file)).mean() for tile in chosen]
    np.testing.assert_allclose(shades, [100, 75, 175], atol=2)
    sheet, strip = (
        np.asarray(Image.open(tmp_path / "gallery.jpg")),
        np.asarray(Image.open(tmp_path / "strip.jpg")),
    )
    assert (
        abs(sheet[34 + 26 + 80, 10 + 80].mean() - 100) < 3
        and abs(sheet[34 + 26 + 80, 10 + 178 + 80].mean() - 75) < 3
    )
    assert abs(strip[28, 28].mean() - 100) < 3 and strip[28, 150].mean() > 250


def test_pyramid_opens_in_openslide(tmp_path: Path) -> None:
    pixels = np.full((1400, 2100, 3), 240, dtype=np.uint8)
    pixels[:, 1000:] = 120
    shown = heat([[0, 0], [1024, 512]], [0.0, 1.0], 512)
    assert [choose_downsample(w, 10, 1050) for w in (1050, 1051, 2100, 2101)] == [1, 2, 2, 4]
    output = tmp_path / "out"
    output.mkdir()
    write_heat_pyramid(
        output / "a.tiff",
        picture_slide(tmp_path, pixels, mpp=0.25),
        shown,
        (2100, 1400),
        0.25,
        1050,
    )
    with openslide.OpenSlide(output / "a.tiff") as slide:
        assert (
            slide.level_dimensions == ((1050, 700), (525, 350), (263, 175))
            or slide.level_count == 4
        )
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.level_downsamples[1] == pytest.approx(2, rel=0.01)
        for level in range(slide.level_count):
            region = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[
                ..., :3
            ].astype(int)
            size, table = slide.level_dimensions[level], make_colour_table("viridis").astype(int)
            assert np.abs(region[size[1] * 9 // 10, size[0] // 4] - 240).max() <= 3
            assert np.abs(region[size[1] // 10, size[0] // 10] - (240 + table[0]) // 2).max() <= 4
            assert (
                np.abs(region[size[1] // 2, size[0] * 6 // 10] - (120 + table[255]) // 2).max() <= 4
            )
    with tifffile.TiffFile(output / "a.tiff") as file:
        page = file.pages[0]
        assert page.is_tiled and page.compression.name == "JPEG" and page.tilewidth == 256
        assert max(file.pages[-1].shape[:2]) <= 256
    with open_slide(output / "a.tiff") as slide:
        assert slide.mpp == pytest.approx(0.5)
    assert [path.name for path in output.iterdir()] == ["a.tiff"]


def test_pyramid_without_slide_or_resolution(tmp_path: Path) -> None:
    write_heat_pyramid(
        tmp_path / "a.tiff", None, heat([[0, 0]], [1.0], 64, alpha=1.0), (200, 100), 0.0, 256
    )
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        region = np.asarray(slide.read_region((0, 0), 0, (200, 100)))[..., :3].astype(int)
        assert (
            "openslide.mpp-x" not in slide.properties and np.abs(region[90, 190] - 255).max() <= 2
        )
        assert np.abs(region[30, 30] - make_colour_table("viridis")[255]).max() <= 4


def test_frame_has_bar_and_scale() -> None:
    page = np.asarray(
        add_frame(
            np.full((300, 700, 3), 255, dtype=np.uint8),
            heat([[0, 0]], [1.0], 9),
            "t",
            "9 tiles",
            1.0,
        )
    )
    assert page.shape == (374, 700, 3)
    bar = page[300 + 57]
    for end in (1, 254):
        assert (np.abs(bar.astype(int) - make_colour_table("viridis")[end]).max(1) <= 3).any()
    row = (page[300 + 14] == (30, 38, 46)).all(1)
    lengths = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]))))[::2]
    assert 101 in lengths  # 100 um at 1 um per pixel
    large = np.asarray(
        add_frame(
            np.full((30, 1800, 3), 255, dtype=np.uint8),
            heat([[0, 0]], [1.0], 9),
            "t",
            "9 tiles",
            1.0,
        )
    )
    row = (large[30 + 28] == (30, 38, 46)).all(1)
    assert (
        large.shape == (178, 1800, 3)
        and 201 in np.diff(np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]))))[::2]
    )
    assert (format_length(50.0), format_length(2000.0)) == ("50 µm", "2 mm")
    assert {bytes(load_caption_font(12).getmask(sign)) for sign in "µéß"}.isdisjoint(
        {bytes(load_caption_font(12).getmask("\uffff"))}
    )
    assert describe_scale({"width": 4000, "mpp": 0.5}) == ("500 µm", 25.0)
    assert [choose_round_length(most) for most in (1.0, 99.0, 110.0, 4999.0)] == [1, 50, 100, 2000]
    ringed = draw_outlines(
        np.full((50, 50, 3), 200, dtype=np.uint8),
        [np.array([[20, 20], [80, 20], [80, 80], [20, 80]])],
        (0.5, 0.5),
    )
    assert (
        (ringed[10, 25] == 20).all()
        and (ringed[25, 25] == 200).all()
        and (ringed[11, 25] == 255).all()
    )


def test_sizes_and_settings(tmp_path: Path) -> None:
    slide = picture_slide(tmp_path, np.zeros((400, 800, 3), np.uint8), mpp=0.5)
    assert choose_picture_side(Drawing(max_side=300), slide, (800, 400), 0.5) == 300
    assert choose_picture_side(Drawing(level=0), slide, (800, 400), 0.5) == 800
    assert choose_picture_side(Drawing(mpp=2.0), slide, (800, 400), 0.5) == 200
    for wrong, words in (
        (Drawing(level=1), "expected a level of the slide"),
        (Drawing(mpp=0.01), "at most 20000"),
    ):
        with pytest.raises(UserError, match=words):
            choose_picture_side(wrong, slide, (800, 400), 0.5)
    with pytest.raises(UserError, match="known resolution"):
        choose_picture_side(Drawing(mpp=1.0), slide, (800, 400), 0.0)
    for changed, words in (
        ({"level": 1, "mpp": 1.0}, "one of them"),
        ({"of_class": "x"}, "expected one of a, b"),
        ({"alpha": 0.0}, "alpha"),
        ({"top": 0}, "at least 1"),
        ({"mpp": -1.0}, "more than 0"),
    ):
        with pytest.raises(UserError, match=words):
            check_drawing(Drawing(**changed), Classification(("a", "b")))


def predictions(seed: int = 0, classes: int = 2, slides: int = 120) -> Predictions:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(classes), slides)
    targets = np.array([generator.choice(classes, p=p) for p in probabilities])
    return Predictions(
        seed, np.arange(slides).astype(str), targets, probabilities, 0.6 if classes == 2 else None
    )


def test_calibration_against_scikit_learn() -> None:
    runs = [predictions(0), predictions(1)]
    targets, probabilities = pool_runs(runs)
    share, mean = calibration_curve(targets, probabilities[:, 1], n_bins=10)
    found = bin_answers(runs)
    np.testing.assert_allclose([row["share"] for row in found], share)
    np.testing.assert_allclose([row["score"] for row in found], mean)
    counts, _ = np.histogram(probabilities[:, 1], bins=10, range=(0, 1))
    assert [row["slides"] for row in found] == counts[counts > 0].tolist()
    error, brier = measure_calibration(runs)
    assert error == pytest.approx(np.average(np.abs(share - mean), weights=counts[counts > 0]))
    assert brier == pytest.approx(brier_score_loss(targets, probabilities[:, 1]))
    twice = bin_answers([*runs, *runs], repeats=2.0)  # no more slides, so no narrower interval
    np.testing.assert_allclose(
        [(r["low"], r["high"]) for r in twice], [(r["low"], r["high"]) for r in found]
    )
    sure = replace(runs[0], targets=np.array([1, 1]), probabilities=np.array([[0.0, 1.0]] * 2))
    assert [row["score"] for row in bin_answers([sure])] == [
        1.0
    ]  # bins without answers are left out
    low, high = wilson(0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)  # Wilson's interval of 5 in 10


def test_confusion_uses_the_validation_threshold() -> None:
    run = predictions()
    called = (run.probabilities[:, 1] >= 0.6).astype(int)
    counts = count_confusion([run, run], Classification(("a", "b")))
    assert counts[1, 0] == 2 * ((run.targets == 1) & (called == 0)).sum() and counts.sum() == 240
    graded = predictions(classes=3)  # of grades the median one
    middle = (graded.probabilities.cumsum(1) < 0.5).sum(1)
    names = ("a", "b", "c")
    by_median = count_confusion([graded], Ordinal(names))
    assert np.trace(by_median) == (middle == graded.targets).sum()
    assert (count_confusion([graded], Classification(names)) != by_median).any()
    three = predictions(classes=3)
    assert draw_roc_by_class([three], ("a", "b", "c")) is not None
    assert draw_roc_by_class([], ("a", "b")) is None
    right = sum(row["share"] * row["slides"] for row in bin_answers([three]))
    assert right == pytest.approx((three.probabilities.argmax(1) == three.targets).sum())
