"""A tile descriptor without weights: stain histograms, local binary patterns, granulometry and
nucleus statistics.

The embedded default encoder, so that the whole road runs where no foundation model can be
downloaded. Classical parts: colour deconvolution (Ruifrok and Johnston 2001, matrix of skimage's
rgb2hed), local binary patterns (`pattern_shares`), pattern spectrum (`granulometry`). Own choices:
the nuclear channel is the smaller of the red and green optical densities, because haematoxylin
absorbs both while eosin, orange G and light green absorb one; centring and scaling are constants
(`stain_texture_scale.csv`), so a tile's vector does not depend on the cohort.

Lengths are pixels of the tile, meant for 0.5 um a pixel: a normal nucleus of a squamous cell has a
radius of 6 to 8 px. Entries are shares or means over the tile except peaks and the largest nucleus,
so tiles of any size compare.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from patch_encoder.descriptors.granulometry import RADII, granulometry, remove_ground
from patch_encoder.descriptors.nucleus_statistics import NUCLEUS_NAMES, nucleus_statistics

MARGIN = 2
RINGS = {1: ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)),
         3: ((0, 3), (2, 2), (3, 0), (2, -2), (0, -3), (-2, -2), (-3, 0), (-2, 2))}  # fmt: skip
"""Neighbours (row, column) by radius, in order around the ring."""
PATTERNS = 10


def _make_pattern_table() -> np.ndarray:
    """Pattern of each of 256 codes: brighter neighbours if it changes at most twice, else 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), PATTERNS - 1).astype(np.uint8)


_TABLE = _make_pattern_table()


def pattern_shares(values: UInt8[np.ndarray, "h w"], radius: int) -> Float32[np.ndarray, " 10"]:
    """Share of the pixels (a border of `radius` left out) that shows each of the ten patterns.

    Rotation-invariant uniform local binary patterns (Ojala, Pietikainen, Maenpaa, PAMI 2002), on
    bytes. Two differences: the eight neighbours stand at whole pixels of a ring, so that no
    interpolation is needed and a turn by 90 degrees changes nothing; and a neighbour has to be
    brighter by `MARGIN`, so that flat glass has one pattern and not the pattern of its noise.
    """
    height, width = values.shape
    inner = values[radius : height - radius, radius : width - radius]
    threshold = np.minimum(inner, 255 - MARGIN) + np.uint8(MARGIN)
    code = np.zeros(inner.shape, dtype=np.uint8)
    for bit, (down, right) in enumerate(RINGS[radius]):
        neighbour = values[
            radius + down : height - radius + down, radius + right : width - radius + right
        ]
        code |= (neighbour >= threshold).view(np.uint8) << np.uint8(bit)
    counts = np.bincount(code.ravel(), minlength=256)
    return (np.bincount(_TABLE, weights=counts, minlength=PATTERNS) / inner.size).astype(np.float32)


SCALE = Path(__file__).with_name("stain_texture_scale.csv")
SMALLEST_SIDE = 16
LIMIT = 8.0
"""Entries are cut off at this many spreads: a new stain must not drown the others."""
STEPS = 100
"""Optical density 1 is this many steps of a byte."""
GROUND = 21
"""Radius (px), larger than abnormal nuclei, above which dark areas count as ground."""
BINS = 12
CHANNELS = ("haematoxylin", "eosin", "nuclear")
DEEPEST = {"haematoxylin": 0.9, "eosin": 0.3, "nuclear": 1.0}
"""Density at the top of each histogram; what is deeper counts in the last bin."""


def stain_texture(tile: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " d"]:
    """Describe a tile by `describe`, centred and scaled by constants and cut off at LIMIT: a vector
    (DIM,) float32.

    Args:
        tile: (H, W, 3) uint8, red green blue, H and W at least 16.

    Raises:
        ValueError: another shape or dtype.
    """
    centre, spread = read_scale()
    return np.clip((describe(tile) - centre) / spread, -LIMIT, LIMIT)


def describe(tile: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " d"]:
    """The same vector in natural units: roots of shares, densities, pixels; see `feature_names`."""
    if (
        tile.dtype != np.uint8
        or tile.ndim != 3
        or tile.shape[2] != 3
        or min(tile.shape[:2]) < SMALLEST_SIDE
    ):
        expected = f"expected a tile (H, W, 3) uint8 of at least {SMALLEST_SIDE} px a side"
        raise ValueError(f"{expected}, found {tile.dtype} {tile.shape}")
    density = _make_density_table().take(np.moveaxis(tile, 2, 0))  # (3, H, W)
    nuclear = np.minimum(density[0], density[1])
    nuclear_bytes, grey_bytes = _to_bytes(nuclear), _to_bytes(density.mean(axis=0))
    spots = remove_ground(nuclear_bytes, GROUND)
    bodies = nucleus_statistics(spots.astype(np.float32) / STEPS)
    parts = (
        _describe_colours(density, nuclear),
        _describe_patterns(grey_bytes, nuclear_bytes),
        _describe_sizes(spots, nuclear_bytes),
        bodies,
    )
    return np.concatenate(parts).astype(np.float32)


def feature_names() -> list[str]:
    """A name for each entry of the vector, in order."""
    names = [f"{channel}_bin{place}" for channel in CHANNELS for place in range(BINS)]
    names += [
        f"density_{what}_{colour}"
        for what in ("mean", "spread")
        for colour in ("red", "green", "blue")
    ]
    patterns = [f"r{radius}_{place}" for radius in RINGS for place in range(PATTERNS)]
    names += [
        f"pattern_{channel}_{pattern}" for channel in ("grey", "nuclear") for pattern in patterns
    ]
    names += [
        f"{what}_r{radius}" for what in ("dark_spots", "darkest", "light_gaps") for radius in RADII
    ]
    return names + list(NUCLEUS_NAMES)


@lru_cache(maxsize=1)
def read_scale() -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread (DIM,) float32 of each entry, in the order of the names.

    What ImageNet's mean and standard deviation are to a network's input: constants, so that a
    tile's vector never depends on the cohort at hand. Measured once over the 128 px tiles with
    tissue (a tenth of the pixels below 200 in some channel) of 12 slides of `sample_cohort` at seed
    1000, a cohort that nothing else uses, to two digits; a spread below 0.005 counts as 0.005.
    """
    columns = {"names": ("name", "centre", "spread"), "formats": ("U40", "f4", "f4")}
    table = np.loadtxt(SCALE, dtype=columns, delimiter=",", skiprows=1)
    assert table["name"].tolist() == feature_names()
    return table["centre"], table["spread"]


@lru_cache(maxsize=1)
def _make_density_table() -> np.ndarray:
    return -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


@lru_cache(maxsize=1)
def _make_unmixing() -> np.ndarray:
    """Density (red, green, blue) -> amount of haematoxylin and eosin, (2, 3)."""
    from skimage.color import hed_from_rgb  # a while to load

    return hed_from_rgb.T[:2].astype(np.float32)


def _to_bytes(density: np.ndarray) -> np.ndarray:
    return np.minimum(density * STEPS, 255).astype(np.uint8)


def _describe_colours(density: np.ndarray, nuclear: np.ndarray) -> np.ndarray:
    """Roots of histogram shares (3 * BINS), then mean and spread of the density (6)."""
    flat = density.reshape(3, -1)
    stains = (*(_make_unmixing() @ flat), nuclear.ravel())
    shares = []
    for channel, amount in zip(CHANNELS, stains, strict=True):
        place = np.clip(amount * (BINS / DEEPEST[channel]), 0, BINS - 1).astype(np.intp)
        shares.append(np.sqrt(_put_rest_first(np.bincount(place, minlength=BINS) / place.size)))
    return np.concatenate((*shares, flat.mean(axis=1), flat.std(axis=1)))


def _describe_patterns(*channels: np.ndarray) -> np.ndarray:
    shares = [
        _put_rest_first(pattern_shares(channel, radius)) for channel in channels for radius in RINGS
    ]
    return np.sqrt(np.concatenate(shares))


def _put_rest_first(shares: np.ndarray) -> np.ndarray:
    """Replace the first share by what it leaves: most of a tile is empty, 1 shows little."""
    return np.concatenate(([1 - shares[0]], shares[1:])).clip(0)


def _describe_sizes(spots: np.ndarray, nuclear: np.ndarray) -> np.ndarray:
    """Granulometry of dark spots (amount, darkest) and of light gaps in nuclear density."""
    dark, darkest = granulometry(spots)
    light, _ = granulometry(255 - nuclear)
    return np.concatenate((np.sqrt(dark), darkest / STEPS, np.sqrt(light)))


DIM = len(feature_names())
