"""Stain augmentation: the deconvolution is skimage's, no strength no change, the same draws the
same tiles, no drift.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from skimage.color import rgb2hed

from patch_encoder.stain.augment import (
    WHITE,
    HedJitter,
    StainJitter,
    draw_factors,
    make_mixing_matrix,
)
from patch_encoder.stain.macenko import fit_macenko, make_unmixing_matrix
from patch_encoder.stain.optical_density import optical_density
from tests.patch_encoder.stain.stain_fixture import degrees, draw_tile

JITTERS = [HedJitter(0.1, 0.1), StainJitter(0.3, 0.1)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure_hed_amounts(density: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(make_mixing_matrix(density.device)).to(density) @ density


def test_amounts_are_skimages() -> None:
    tile = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=seeded())
    light = (tile.permute(1, 2, 0).double().numpy() + 1) / WHITE  # as bright as ours takes it
    expected = rgb2hed(light) * -math.log(1e-6)  # in natural units
    found = measure_hed_amounts(optical_density(tile, WHITE))[0].T.view(32, 32, 3).double().numpy()
    assert np.allclose(found.clip(0), expected, atol=1e-4)  # skimage cuts off below 0


@pytest.mark.parametrize("jitter", [HedJitter(0.0, 0.0), StainJitter(0.0, 0.0)])
def test_no_strength_is_the_identity(jitter: HedJitter | StainJitter) -> None:
    tiles = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=seeded())
    assert torch.equal(jitter(tiles, seeded()), tiles)


@pytest.mark.parametrize("jitter", JITTERS)
def test_draws_follow_the_generator(jitter: HedJitter | StainJitter) -> None:
    tiles = torch.stack([draw_tile(side=64, seed=seed) for seed in range(20)])
    once = jitter(tiles, seeded(3))
    assert torch.equal(jitter(tiles, seeded(3)), once)
    assert not torch.equal(jitter(tiles, seeded(4)), once)
    generator = seeded(3)
    assert torch.equal(torch.stack([jitter(tile, generator) for tile in tiles]), once), (
        "a batch is its tiles one by one"
    )
    assert all(not torch.equal(a, b) for a, b in zip(once, tiles, strict=True))


def test_hed_jitter_is_its_equation() -> None:
    tile = draw_tile(side=32, noise=2.0)
    factor, shift = draw_factors(1, 3, 0.2, 0.1, seeded(5))
    amounts = (
        measure_hed_amounts(optical_density(tile, WHITE)) * factor[..., None] + shift[..., None]
    )
    found = measure_hed_amounts(optical_density(HedJitter(0.2, 0.1)(tile, seeded(5)), WHITE))
    assert (found - amounts).abs().mean() < 0.01  # a byte's rounding


def test_nothing_drifts_in_expectation() -> None:
    factor, shift = draw_factors(20_000, 3, 0.2, 0.1, seeded())
    assert torch.allclose(factor.mean(0), torch.ones(3), atol=0.004) and torch.allclose(
        shift.mean(0), torch.zeros(3), atol=0.002
    )
    assert float((factor - 1).abs().max()) <= 0.2 and float(shift.abs().max()) <= 0.1
    assert float((factor - 1).abs().max()) > 0.199 and float(shift.abs().max()) > 0.099
    tile = draw_tile(side=24)
    of_stains = partial(StainJitter(0.2, 0.05), profile=fit_macenko(tile))
    for jitter, light in ((HedJitter(0.1, 0.05), WHITE), (of_stains, 240.0)):
        many = jitter(tile.expand(3000, 3, 24, 24), seeded(1))
        mean = optical_density(many, light).mean(0)
        assert (mean - optical_density(tile, light)[0]).abs().mean() < 0.01


def test_stain_jitter_moves_amounts_and_leaves_the_rest() -> None:
    tile = draw_tile(noise=3.0)
    found = fit_macenko(tile)
    new = StainJitter(0.4, 0.0)(tile, seeded(2))
    before, after = optical_density(tile)[0], optical_density(new)[0]
    back = make_unmixing_matrix(found.matrix)[0]
    factor, _ = draw_factors(1, 2, 0.4, 0.0, seeded(2))
    assert (back @ after - factor[0, :, None] * (back @ before)).abs().mean() < 0.02
    third = torch.linalg.cross(found.matrix[0, :, 0], found.matrix[0, :, 1])
    assert (third @ after - third @ before).abs().mean() < 0.02, (
        "noise outside the stains' plane stays"
    )
    assert degrees(fit_macenko(new).matrix[0, :, 0], found.matrix[0, :, 0]) < 4


def test_blank_and_black_tiles_stay_under_stain_jitter() -> None:
    tiles = torch.stack(
        [torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (0, 240, 255)]
    )
    assert torch.equal(StainJitter()(tiles, seeded()), tiles)
