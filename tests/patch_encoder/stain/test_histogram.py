"""Histogram matching against scikit-image's on real pictures; blank tiles; statistics of a field."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage.exposure import match_histograms

from patch_encoder.stain.histogram import count_levels, has_tissue, match_histogram
from tests.patch_encoder.stain.stain_fixture import draw_tile, picture

PICTURES = ("torchstain_target.png", "torchstain_source.png", "tiatoolbox_target.png")


def convert_to_array(tile: object) -> np.ndarray:
    return np.ascontiguousarray(tile.permute(1, 2, 0).numpy())  # type: ignore[attr-defined]


@pytest.mark.parametrize("reference", range(len(PICTURES)))
def test_it_is_scikit_images_on_real_pictures(real_data: Path, reference: int) -> None:
    pictures = [convert_to_array(picture(real_data / "stain_targets" / n)) for n in PICTURES]
    target = pictures[reference]
    kept = count_levels(target)
    for source in pictures:
        for tile in (source, source[40:151, 10:140], source[:1, :1]):
            expected = match_histograms(tile, target, channel_axis=-1)
            assert np.array_equal(match_histogram(tile, kept), expected)


def test_it_is_scikit_images_for_levels_that_are_rare() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        tile, target = (
            rng.integers(low, 256, (9, 7, 3)).astype(np.uint8)
            // rng.integers(1, 60, dtype=np.uint8)
            for low in rng.integers(0, 250, 2)
        )
        expected = match_histograms(tile, target, channel_axis=-1)
        assert np.array_equal(match_histogram(tile, count_levels(target)), expected)


def test_a_field_as_source_gives_its_tiles_one_map() -> None:
    field, target = convert_to_array(draw_tile(seed=1)), convert_to_array(draw_tile(seed=2)) // 2
    source, kept = count_levels(field), count_levels(target)
    whole = match_histogram(field, kept)
    part = match_histogram(field[:30, :50], kept, source)
    assert np.array_equal(part, whole[:30, :50])
    assert not np.array_equal(part, match_histogram(field[:30, :50], kept))


def test_glass_is_no_tissue() -> None:
    rng = np.random.default_rng(0)
    glass = rng.integers(236, 251, (96, 96, 3)).astype(np.uint8)
    tissue = convert_to_array(draw_tile(side=96))
    assert has_tissue(tissue) and not has_tissue(glass)
    assert not has_tissue(np.full((96, 96, 3), 255, np.uint8))
    assert not has_tissue(np.zeros((96, 96, 3), np.uint8))
    # without the guard, noise on glass would become tissue
    assert has_tissue(match_histogram(glass, count_levels(tissue)))
    some = glass.copy()
    some[:16] = tissue[:16]
    assert has_tissue(some)
