"""The tile descriptor without weights, against hand-checkable pictures, naive loops and
scikit-image.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import grey_opening
from skimage.measure import label, regionprops

from patch_encoder.demo.cytology.cells import HIGH_GRADE, INTERMEDIATE
from patch_encoder.demo.cytology.smear import SmearObject
from patch_encoder.demo.cytology.stain import draw_style
from patch_encoder.demo.drawing.density import develop
from patch_encoder.descriptors.granulometry import (
    COARSE,
    FINE,
    RADII,
    granulometry,
    halve,
    remove_ground,
)
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.descriptors.nucleus_statistics import (
    AREAS,
    NUCLEUS_NAMES,
    measure_bodies,
    nucleus_statistics,
)
from patch_encoder.descriptors.stain_texture import (
    DIM,
    LIMIT,
    MARGIN,
    RINGS,
    describe,
    feature_names,
    pattern_shares,
    read_scale,
    stain_texture,
)


def disc(radius: float, side: int = 128, value: int = 200) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.where(x * x + y * y <= radius * radius, value, 0).astype(np.uint8)


def octagon(radius: int) -> np.ndarray:
    """A point grown by crosses and squares in turn, one pixel at a time."""
    points = {(0, 0)}
    for step in range(1, radius + 1):
        square = [(1, 1), (1, -1), (-1, 1), (-1, -1)] if step % 2 == 0 else []
        points |= {
            (y + dy, x + dx)
            for y, x in points
            for dy, dx in [(0, 1), (1, 0), (0, -1), (-1, 0), *square]
        }
    footprint = np.zeros((2 * radius + 1, 2 * radius + 1), dtype=bool)
    for y, x in points:
        footprint[y + radius, x + radius] = True
    return footprint


def smear_tile(kind: object, seed: int) -> np.ndarray:
    """One cell alone in the middle of 128 px of glass."""
    style = draw_style(np.random.default_rng(seed))
    drawn = SmearObject(kind, (64.0, 64.0), (seed,)).draw(style)  # type: ignore[arg-type]
    canvas = np.zeros((3, 256, 256), dtype=np.int16)
    (row, column), (height, width) = (drawn.row + 64, drawn.column + 64), drawn.density.shape[1:]
    canvas[:, row : row + height, column : column + width] += drawn.density
    return develop(canvas, style.lamp)[64:192, 64:192]


def test_the_vector_its_names_and_its_scale_agree() -> None:
    names = feature_names()
    assert len(names) == len(set(names)) == DIM == 151
    centre, spread = read_scale()
    assert centre.shape == spread.shape == (DIM,) and (spread > 0).all()
    vector = stain_texture(smear_tile(INTERMEDIATE, 0))
    assert vector.shape == (DIM,) and vector.dtype == np.float32


def test_a_white_tile_is_described_by_zeros() -> None:
    assert not describe(np.full((128, 128, 3), 255, dtype=np.uint8)).any()


@pytest.mark.parametrize("shape", [(16, 16), (17, 31), (128, 128), (100, 257)])
@pytest.mark.parametrize("kind", ["white", "black", "noise", "edge", "red"])
def test_any_tile_gives_finite_bounded_numbers(shape: tuple[int, int], kind: str) -> None:
    tile = np.full((*shape, 3), 255, dtype=np.uint8)
    if kind == "black":
        tile[:] = 0
    elif kind == "noise":
        tile = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    elif kind == "edge":
        tile[:, shape[1] // 2 :] = 0
    elif kind == "red":
        tile[..., 1:] = 0
    vector = stain_texture(tile)
    assert vector.shape == (DIM,) and vector.dtype == np.float32
    assert np.isfinite(vector).all() and np.abs(vector).max() <= LIMIT


@pytest.mark.parametrize(
    "tile",
    [
        np.zeros((128, 128), np.uint8),
        np.zeros((8, 128, 3), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(tile: np.ndarray) -> None:
    with pytest.raises(Exception, match=r"expected a tile|Type-check error"):
        stain_texture(tile)


def test_turning_and_mirroring_a_tile_change_nothing() -> None:
    tile = smear_tile(HIGH_GRADE, 3)
    expected = stain_texture(tile)
    for other in (np.rot90(tile), np.rot90(tile, 2), tile[::-1], tile.transpose(1, 0, 2)):
        np.testing.assert_allclose(stain_texture(other), expected, atol=2e-3)


@pytest.mark.parametrize("radius", [2, 3, 4, 6, 8, 10, 12, 15, 19])
def test_a_disc_shows_at_its_radius_in_the_pattern_spectrum(radius: int) -> None:
    spectrum, peaks = granulometry(disc(radius, 129))
    index = int(np.argmax(spectrum))
    # removed by the octagon at RADII[index], which reaches out 12 % further at its corners
    assert RADII[index - 1] <= radius <= 1.15 * RADII[index]
    assert radius > 0.85 * RADII[index - 1]
    assert spectrum[: index - 1].sum() < 0.2 * spectrum.sum(), (
        "smaller spots: only the rim of the disc"
    )
    assert spectrum[index + 1 :].sum() == 0 and peaks[-1] == (200 if radius > 21 else 0)


def test_larger_discs_peak_at_larger_radii() -> None:
    peaks = [int(np.argmax(granulometry(disc(radius, 129))[0])) for radius in range(2, 20)]
    assert peaks == sorted(peaks) and set(peaks) == set(range(1, 10))


def test_openings_are_those_of_an_octagon() -> None:
    rng = np.random.default_rng(1)
    values = np.zeros((64, 80), dtype=np.uint8)
    values[16:48, 16:64] = rng.integers(
        0, 256, (32, 48), dtype=np.uint8
    )  # away from the border, where conventions differ
    values = np.maximum(values // 4, np.roll(disc(9, 80)[8:72], 3, axis=1))
    spectrum, peaks = granulometry(values)
    opened = [grey_opening(values, footprint=octagon(radius)) for radius in FINE]
    opened += [grey_opening(halve(values), footprint=octagon(radius // 2)) for radius in COARSE]
    means = np.array([values.mean(), *(level.mean() for level in opened)])
    np.testing.assert_allclose(spectrum, np.maximum(-np.diff(means), 0), atol=1e-4)
    np.testing.assert_array_equal(peaks, [level.max() for level in opened])


def test_openings_take_no_notice_of_what_is_outside() -> None:
    spectrum, peaks = granulometry(np.full((33, 48), 120, dtype=np.uint8))
    assert not spectrum.any() and np.all(peaks == 120)


def test_without_ground_keeps_spots_and_drops_what_they_lie_on() -> None:
    values = np.full((101, 128), 60, dtype=np.uint8)
    spot = disc(8, 128, 90)[:101]
    found = remove_ground(values + spot, 21)
    assert np.array_equal(found, spot)


def test_patterns_match_a_plain_loop() -> None:
    values = np.random.default_rng(2).integers(0, 30, (14, 17), dtype=np.uint8)
    for radius, ring in RINGS.items():
        counts = np.zeros(10)
        for y in range(radius, 14 - radius):
            for x in range(radius, 17 - radius):
                bits = [
                    int(values[y + dy, x + dx]) - int(values[y, x]) >= MARGIN for dy, dx in ring
                ]
                changes = sum(bits[place] != bits[place - 1] for place in range(8))
                counts[sum(bits) if changes <= 2 else 9] += 1
        np.testing.assert_allclose(pattern_shares(values, radius), counts / counts.sum(), rtol=1e-6)


def test_body_measures_match_scikit_image() -> None:
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:128, :128]
    mask = ((x - 30) ** 2 / 64 + (y - 40) ** 2 / 200 < 1) | ((x - 90) ** 2 + (y - 80) ** 2 < 121)
    nuclear = rng.random((128, 128)).astype(np.float32)
    bodies = measure_bodies(mask, nuclear, nuclear)
    regions = regionprops(label(mask, connectivity=1), intensity_image=nuclear)
    np.testing.assert_allclose(bodies.area, [region.area for region in regions])
    np.testing.assert_allclose(
        bodies.eccentricity, [region.eccentricity for region in regions], atol=2e-3
    )
    np.testing.assert_allclose(
        bodies.depth, [region.intensity_mean for region in regions], rtol=1e-5
    )
    np.testing.assert_allclose(
        bodies.spread, [region.intensity_std for region in regions], rtol=1e-5
    )
    np.testing.assert_allclose(bodies.fill, 1, atol=0.02)


def test_bodies_are_counted_by_size_and_a_clump_is_not_compact() -> None:
    def statistics(mask: np.ndarray) -> dict[str, float]:
        return dict(
            zip(NUCLEUS_NAMES, nucleus_statistics(mask.astype(np.float32) / 255), strict=True)
        )

    two = np.concatenate((disc(7, 64), disc(15, 64)), axis=1)
    found = statistics(two)
    for name, area in (
        ("compact", 7**2 * np.pi),
        ("compact", 15**2 * np.pi),
        ("all", 15**2 * np.pi),
    ):
        bound = max(bound for bound in AREAS if bound <= area)
        assert found[f"{name}_bodies_from_{bound}"] == pytest.approx(np.log(2))
    assert sum(found[f"all_bodies_from_{bound}"] for bound in AREAS) == pytest.approx(2 * np.log(2))
    assert found["largest_any_area"] == pytest.approx(np.log1p(np.pi * 15**2), abs=0.1)
    clump = np.max(
        [np.roll(disc(7), (dy, dx), (0, 1)) for dy, dx in ((0, 0), (12, 0), (0, 12), (24, 0))],
        axis=0,
    )
    assert statistics(clump)["largest_any_fill"] < 0.9 < found["largest_any_fill"]
    assert statistics(clump)["largest_compact_area"] == 0


def test_an_abnormal_nucleus_stands_out_from_a_normal_one() -> None:
    place = {name: number for number, name in enumerate(feature_names())}
    normal = np.array([stain_texture(smear_tile(INTERMEDIATE, seed)) for seed in range(12)])
    abnormal = np.array([stain_texture(smear_tile(HIGH_GRADE, seed)) for seed in range(12)])
    for name in ("largest_any_area", "darkest_r11", "core_share"):
        assert np.median(abnormal[:, place[name]]) > np.max(normal[:, place[name]]), name


def test_typical_tiles_have_entries_of_about_unit_size() -> None:
    tiles = [
        stain_texture(smear_tile(kind, seed))
        for kind in (INTERMEDIATE, HIGH_GRADE)
        for seed in range(10)
    ]
    assert 0.2 < np.abs(np.array(tiles)).mean() < 2


def test_mean_colour_is_the_mean_in_0_to_1() -> None:
    tile = np.zeros((4, 6, 3), dtype=np.uint8)
    tile[:2] = (255, 51, 0)
    found = mean_colour(tile)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.5, 0.1, 0.0], rtol=1e-6)
