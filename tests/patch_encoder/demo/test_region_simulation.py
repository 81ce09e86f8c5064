"""The region simulator: its zones are mixtures that clump, its nuisance is an offset and nothing
else, and its files are what other stages read.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from patch_encoder.bags.bag import open_bag
from patch_encoder.demo.region_simulation import (
    CLUMPS,
    MIXTURES,
    TILE,
    RegionSimulation,
    _draw_types,
    simulate_slide,
    write_simulated_cohort,
)
from wsi_common.errors import UserError

SMALL = RegionSimulation(slides=4, rows=2, columns=3, region_tiles=4, width=8)


def test_the_nuisance_is_an_offset_of_each_slide_and_changes_nothing_else() -> None:
    for number in range(3):
        plain, moved, far = (
            simulate_slide(replace(SMALL, nuisance=nuisance), number) for nuisance in (0, 1, 2)
        )
        assert np.array_equal(plain.zones, moved.zones) and plain.label == moved.label
        shift = moved.tiles.astype(np.float64) - plain.tiles
        assert shift.std((0, 1)).max() < 0.01 and np.abs(shift.mean((0, 1))).max() > 0.3
        twice = far.tiles.astype(np.float64) - plain.tiles
        assert np.allclose(twice.mean((0, 1)), 2 * shift.mean((0, 1)), atol=0.01)
    offsets = [
        (simulate_slide(replace(SMALL, nuisance=1), n).tiles - simulate_slide(SMALL, n).tiles)[0, 0]
        for n in range(2)
    ]
    assert not np.allclose(*offsets, atol=0.1)


def test_standardising_takes_the_nuisance_away() -> None:
    """Therefore one nuisance stands for all where features are standardised."""

    def standardise(nuisance: float) -> np.ndarray:
        tiles = simulate_slide(replace(SMALL, nuisance=nuisance), 0).tiles.astype(np.float64)
        return (tiles - tiles.mean((0, 1))) / tiles.std((0, 1))

    assert np.abs(standardise(0) - standardise(2)).max() < 0.02  # half precision


def test_clumping_keeps_the_mixture_of_a_zone() -> None:
    for zone, (mixture, width) in enumerate(zip(MIXTURES, CLUMPS, strict=True)):
        types = _draw_types(np.random.default_rng(zone), np.full((300, 300), zone))
        shares = np.bincount(types.ravel(), minlength=len(mixture)) / types.size
        assert np.allclose(shares, mixture, atol=0.02)
        alike = (types[:, 1:] == types[:, :-1]).mean()
        independent = (mixture**2).sum()
        assert abs(alike - independent) < 0.02 if width == 1 else alike > independent + 0.1


def test_the_label_decides_how_much_of_each_zone_there_is() -> None:
    simulation = RegionSimulation(slides=200)
    slides = [simulate_slide(simulation, number) for number in range(200)]
    shares = {
        label: np.mean([(s.zones == 3).mean() for s in slides if s.label == label])
        for label in ("negative", "positive")
    }
    assert shares["positive"] > shares["negative"] + 0.1
    assert sum(slide.label == "positive" for slide in slides) == 100


def test_the_files_agree_with_the_simulation(tmp_path: Path) -> None:
    write_simulated_cohort(tmp_path, SMALL)
    with (tmp_path / "zones.csv").open() as stream:
        zones = {
            (r["slide_id"], int(r["x"]), int(r["y"])): r["label"] for r in csv.DictReader(stream)
        }
    assert len(zones) == 4 * 6
    for number in range(4):
        slide = simulate_slide(SMALL, number)
        bag = open_bag(tmp_path / "features" / "h5_files" / f"{slide.slide_id}.h5")
        coords = bag.coordinates().coords
        stored = bag.read().numpy()
        for row, (x, y) in zip(stored, coords, strict=True):
            assert np.array_equal(row, slide.tiles[y // TILE, x // TILE])
        for row, column in np.ndindex(2, 3):
            corner = (slide.slide_id, column * 4 * TILE, row * 4 * TILE)
            assert zones[corner] == f"zone_{slide.zones[row, column]}"
    before = (tmp_path / "zones.csv").stat().st_mtime_ns
    write_simulated_cohort(tmp_path, SMALL)
    assert (tmp_path / "zones.csv").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="nuisance 0.0 -> 1"):
        write_simulated_cohort(tmp_path, replace(SMALL, nuisance=1))
