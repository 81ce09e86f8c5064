"""Stain normalisation of tiles of fields: histogram matching, Macenko's method, or one after the
other as in UTS.

With `stain_scope=slide` the statistics are those of a field, measured once on a few of its tiles.
With `stain_scope=tile` they are each tile's own, from all of its pixels, glass as well: the
procedure of UTS, to one grey level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.tiling import place_tiles
from patch_encoder.slides import RegionError
from patch_encoder.stain.histogram import (
    ColourHistogram,
    count_levels,
    has_tissue,
    match_histogram,
)
from patch_encoder.stain.macenko import (
    StainProfile,
    fit_macenko,
    make_common_profile,
    normalise_macenko,
)
from patch_encoder.stain.normaliser import SCOPES, convert_to_tensor, read_target
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.config import key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
STAINS = ("none", "macenko", "histogram", "histogram_macenko")
SAMPLE, TRIED, THINNED = 16, 64, 4
"""Tiles with tissue that a field is measured on, tiles that are looked at for them, and which part
of their rows and columns is taken."""


@dataclass
class FieldStainKeys:
    """Stain normalisation of fields."""

    stain: str = key("none", "stain normalisation of the tiles", choices=STAINS)
    stain_target: str = key(
        "", "picture of H&E whose stain the tiles get; empty: a common reference", path=True
    )
    stain_scope: str = key(
        "slide",
        "stain statistics of the whole slide, or of each tile; a field counts as a slide, and 16 "
        "of its tiles are measured",
        choices=SCOPES,
    )


class SourceStain(NamedTuple):
    """Statistics of a field's own colours; None: not needed."""

    histogram: ColourHistogram | None
    profile: StainProfile | None


@dataclass(frozen=True)
class FieldStain:
    """What tiles are made to look like; a checkpoint keeps it, so that it needs no picture.

    Attributes:
        kind, scope: as `stain` and `stain_scope`.
        histogram: of the target; None: no histogram matching.
        profile: stains of the target; None: no Macenko.
    """

    kind: str
    scope: str
    histogram: ColourHistogram | None
    profile: StainProfile | None

    def fit(self, pixels: UInt8[np.ndarray, "h w 3"]) -> SourceStain:
        """What `apply` needs to know about a field, from some of its pixels."""
        source = count_levels(pixels) if self.histogram else None
        if self.profile is None:
            return SourceStain(source, None)
        if self.histogram:
            pixels = match_histogram(pixels, self.histogram, source)
        return SourceStain(source, fit_macenko(convert_to_tensor(pixels)))

    def apply(
        self, tile: UInt8[np.ndarray, "s s 3"], source: SourceStain | None = None
    ) -> UInt8[np.ndarray, "s s 3"]:
        """The tile with the target's colours; `source`: of its field, else its own."""
        if self.histogram:
            tile = match_histogram(tile, self.histogram, source.histogram if source else None)
        if self.profile is None:
            return tile
        pixels = convert_to_tensor(tile)
        own = source.profile if source else fit_macenko(pixels, glass=True)
        assert own is not None
        return normalise_macenko(pixels, own, self.profile).permute(1, 2, 0).contiguous().numpy()

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pixels, as plain values."""
        profile = vars(self.profile) if self.profile else {}
        return {
            "kind": self.kind,
            "scope": self.scope,
            "histogram": self.histogram.counts.tolist() if self.histogram else [],
            "profile": {name: value.tolist() for name, value in profile.items()},
        }


def build_field_stain(keys: FieldStainKeys) -> FieldStain | None:
    """The option of these keys; None for stain=none.

    Raises:
        UserError: a target that is no picture of H&E, that is missing for histogram matching, or
            that nothing would use.
    """
    matches, separates = keys.stain.startswith("histogram"), keys.stain.endswith("macenko")
    if keys.stain == "none" or (matches and not keys.stain_target):
        if keys.stain == "none" and not keys.stain_target:
            return None
        expected = "no stain_target" if keys.stain == "none" else "stain_target=<a picture of H&E>"
        raise UserError(
            f"stain={keys.stain}: expected {expected} with it, found {keys.stain_target!r}"
        )
    if not keys.stain_target:
        return FieldStain(keys.stain, keys.stain_scope, None, make_common_profile())
    target = read_target(keys.stain_target)
    profile = fit_macenko(target, glass=keys.stain_scope == "tile") if separates else None
    if profile is not None and not bool(profile.present.all()):
        raise UserError(
            f"stain_target={keys.stain_target}: expected a picture with haematoxylin and eosin, "
            "found none; take a field of dense tissue"
        )
    histogram = count_levels(target.permute(1, 2, 0).numpy()) if matches else None
    return FieldStain(keys.stain, keys.stain_scope, histogram, profile)


def restore_field_stain(description: Mapping[str, Any] | None) -> FieldStain | None:
    """The option that `FieldStain.describe` described; None for None."""
    if not description:
        return None
    counts, profile = description["histogram"], description["profile"]
    return FieldStain(
        description["kind"],
        description["scope"],
        ColourHistogram(np.array(counts, np.int64)) if counts else None,
        StainProfile(**{name: torch.tensor(value) for name, value in profile.items()})
        if profile
        else None,
    )


@dataclass(frozen=True)
class FieldColours:
    """The stain map of a set of fields.

    Attributes:
        stain: the target.
        sources: of each field; None where it has too little tissue. Empty: tile by tile.
    """

    stain: FieldStain
    sources: tuple[SourceStain | None, ...] = ()

    def __call__(self, tile: UInt8[np.ndarray, "s s 3"], field: int) -> UInt8[np.ndarray, "s s 3"]:
        """The tile with the target's colours, or as it is where there is too little tissue."""
        source = self.sources[field] if self.sources else None
        if (self.sources and source is None) or not has_tissue(tile):
            return tile
        return self.stain.apply(tile, source)


def normalise_tiles(tiles: FieldTiles, stain: FieldStain | None) -> FieldTiles:
    """The same tiles, read with the target's colours; the fields are measured here, once."""
    chosen = tiles.select(np.arange(len(tiles)))
    if stain is None or stain.scope == "tile":
        chosen.stain = None if stain is None else FieldColours(stain)
        return chosen
    sources = []
    for number in range(len(tiles.fields)):
        read, name = partial(tiles.read_plain, number), tiles.fields[number].field_id
        sources.append(measure_field(stain, tiles.geometries[number], read, name))
    chosen.stain = FieldColours(stain, tuple(sources))
    return chosen


ReadTile = Callable[[tuple[int, int]], UInt8[np.ndarray, "s s 3"]]
"""A tile of a field by its corner (x, y), level-0 px, in the field's own colours."""


def measure_field(
    stain: FieldStain, geometry: TileGeometry, read: ReadTile, name: str
) -> SourceStain | None:
    """The statistics of a field; None, with a warning, where it has too little tissue.

    Args:
        stain: the target.
        geometry, read: as for `sample_pixels`.
        name: of the field, for the warning.
    """
    pixels = sample_pixels(geometry, read)
    if pixels is None:
        logger.warning("field %s: too little stained tissue, its colours are kept", name)
        return None
    return stain.fit(pixels)


def sample_pixels(geometry: TileGeometry, read: ReadTile) -> UInt8[np.ndarray, "h w 3"] | None:
    """Pixels of up to SAMPLE tiles of a field that have tissue; None where none has.

    They follow from the field and the tiles' side and resolution alone: whichever of its tiles are
    in the set, and with whatever overlap, the field gets the same colours.

    Args:
        geometry: of the tiles that a localiser is trained on.
        read: reads one of them anywhere in the field.
    """
    size = np.array([geometry.level0_width, geometry.level0_height])
    side, shown = geometry.patch_size_level0, geometry.target_size
    corners = place_tiles(*size.tolist(), side, side)
    width, height = np.ceil(np.minimum(size / side, 1) * shown).astype(int)
    found: list[np.ndarray] = []
    for place in np.random.default_rng(0).permutation(len(corners))[:TRIED].tolist():
        if len(found) == SAMPLE:
            break
        try:
            tile = read((int(corners[place, 0]), int(corners[place, 1])))
        except RegionError:
            continue
        if has_tissue(tile[:height, :width]):
            found.append(tile[:height:THINNED, :width:THINNED])
    return np.concatenate(found) if found else None
