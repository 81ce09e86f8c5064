"""The descriptor of colour alone, against NumPy and on pictures whose numbers are known."""

from __future__ import annotations

import numpy as np

from patch_encoder.descriptors.colour_statistics import BINS, DIM, colour_statistics


def test_the_numbers_are_those_of_numpy() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    found, flat = colour_statistics(tile), tile.reshape(-1, 3)
    assert found.shape == (DIM,) == (33,) and found.dtype == np.float32
    np.testing.assert_allclose(found[:3], flat.mean(0) / 255, rtol=1e-6)
    np.testing.assert_allclose(found[3:6], flat.std(0) / 255, rtol=1e-6)
    for channel, bins in enumerate(found[6:].reshape(3, BINS)):
        edges = np.linspace(0, 256, BINS + 1)
        np.testing.assert_allclose(bins, np.histogram(flat[:, channel], edges)[0] / len(flat), 1e-6)


def test_a_tile_of_one_colour_and_one_whose_pixels_are_shuffled() -> None:
    flat = colour_statistics(np.full((8, 8, 3), (0, 128, 255), np.uint8))
    np.testing.assert_allclose(flat[:6], [0, 128 / 255, 1, 0, 0, 0], atol=1e-7)
    assert flat[6:].reshape(3, BINS).argmax(1).tolist() == [0, 4, 8] and flat[6:].sum() == 3
    random = np.random.default_rng(0)
    tile = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    shuffled = random.permutation(tile.reshape(-1, 3)).reshape(tile.shape)
    np.testing.assert_array_equal(colour_statistics(tile), colour_statistics(shuffled))
