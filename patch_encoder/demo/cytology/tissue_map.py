"""The tissue map of a slide: which zone lies where, at low frequency.

Without a map, cells lie uniformly and all parts of a slide look alike. With one, a slide has 3 to 5
zones of the same five kinds as every other slide, so that structure inside a slide has a truth and
repeats across slides. The zones say nothing about the slide's label.

A map is stored as an indexed PNG, one pixel per CELL x CELL px of level 0: the value is the index
in ZONES, and the palette makes it a picture to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.demo.cytology.cells import Drawing, Point
from patch_encoder.demo.cytology.clutter import (
    bacteria,
    debris,
    inflammation,
    mucus,
    neutrophil,
    red_cell,
)
from patch_encoder.demo.drawing.shapes import noise
from wsi_common.errors import UserError
from wsi_common.files import atomic_path

CELL = 32
"""Side of a cell of the map in px of level 0."""
DETAIL = 32
"""Zones are about this many cells wide (1,024 px)."""
BALANCING_ROUNDS = 60


@dataclass(frozen=True)
class Zone:
    """What a kind of zone has more or less of, relative to a slide without zones.

    Attributes:
        colour: of the zone in the stored map.
        cells: density of the cells.
        clustered: share of the places that hold a cluster of cells instead of a single one.
        abnormal: how readily a cell of a positive slide is abnormal here.
        clutter: density of what lies beside the cells; 1 where not named.
    """

    colour: tuple[int, int, int]
    cells: float = 1.0
    clustered: float = 0.12
    abnormal: float = 1.0
    clutter: dict[Drawing, float] = field(default_factory=dict)


ZONES: dict[str, Zone] = {
    "sparse": Zone((222, 222, 222), 0.25, 0.02, 0.5, {neutrophil: 0.4, debris: 0.5}),
    "dense": Zone((90, 140, 200), 2.0, 0.12, 1.0, {mucus: 0.3}),
    "inflamed": Zone((120, 60, 150), 0.7, 0.05, 1.0, {neutrophil: 5.0, inflammation: 8.0}),
    "mucus_blood": Zone((230, 160, 110), 0.4, 0.03, 0.5, {mucus: 10.0, red_cell: 9.0}),
    "clusters": Zone((70, 150, 90), 1.2, 0.6, 6.0, {bacteria: 3.0}),
}


@dataclass(frozen=True)
class TissueMap:
    """Zone of each cell of a square slide: (H, W) uint8 indices into ZONES."""

    zones: np.ndarray

    def at(self, point: Point) -> Zone:
        """The zone at a point (x, y) in px; points outside take that of the nearest edge."""
        last = len(self.zones) - 1
        column, row = (min(max(int(value // CELL), 0), last) for value in point)
        return tuple(ZONES.values())[self.zones[row, column]]

    def mean(self, quantity: Callable[[Zone], float]) -> float:
        """The mean over the slide of a number that each zone has."""
        values = np.array([quantity(zone) for zone in ZONES.values()])
        return float(values[self.zones].mean())


def draw_tissue_map(rng: np.random.Generator, side: int) -> TissueMap:
    """Draw 3 to 5 zones of different kinds, whose shares differ by at most a factor of 3 or so.

    Args:
        rng: of this slide's map alone.
        side: of the slide, px.
    """
    cells = math.ceil(side / CELL)
    kinds = rng.permutation(len(ZONES))[: int(rng.integers(3, 6))]
    wanted = 0.5 + rng.random(len(kinds))
    wanted /= wanted.sum()
    scores = np.stack([noise(rng, (cells, cells), DETAIL) for _ in kinds]).astype(np.float64)
    return TissueMap(kinds[divide_by_shares(scores, wanted)].astype(np.uint8))


def divide_by_shares(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Give each cell to the zone with the highest score there, where zones get a handicap that
    makes their areas about the wanted ones.

    Args:
        scores: (Z, H, W), smooth if the zones are to hang together.
        shares: (Z,) of the area, adding up to 1.

    Returns:
        (H, W) indices of zones.
    """
    handicap, count = np.zeros(len(scores)), len(scores)
    for _ in range(BALANCING_ROUNDS):
        winners = np.argmax(scores + handicap[:, None, None], axis=0)
        handicap += 0.2 * (shares - np.bincount(winners.ravel(), minlength=count) / winners.size)
    return winners


def label_squares(tissue: TissueMap, corners: np.ndarray, side: int) -> np.ndarray:
    """The zone that covers most of each square, such as a tile or a region.

    Args:
        tissue: map of the slide.
        corners: (N, 2) top-left corners (x, y), px of level 0.
        side: of the squares, px of level 0.

    Returns:
        (N,) indices into ZONES.
    """
    found = np.empty(len(corners), dtype=np.int64)
    for place, (x, y) in enumerate(np.asarray(corners) / CELL):
        rows = slice(int(y), max(math.ceil(y + side / CELL), int(y) + 1))
        columns = slice(int(x), max(math.ceil(x + side / CELL), int(x) + 1))
        found[place] = np.bincount(tissue.zones[rows, columns].ravel()).argmax()
    return found


def write_tissue_map(path: Path, tissue: TissueMap) -> None:
    """Write the map as an indexed PNG in the colours of the zones."""
    image = Image.fromarray(tissue.zones).convert("P")
    image.putdata(tissue.zones.ravel().tolist())
    image.putpalette([part for zone in ZONES.values() for part in zone.colour])
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def read_tissue_map(path: Path) -> TissueMap:
    """Read a map that `write_tissue_map` wrote.

    Raises:
        UserError: no such file, or another picture.
    """
    try:
        with Image.open(path) as image:
            zones = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: expected a tissue map of render_cohort, found {error}") from None
    if zones.ndim != 2 or zones.shape[0] != zones.shape[1] or zones.max(initial=0) >= len(ZONES):
        raise UserError(
            f"{path}: expected a tissue map of render_cohort, found another picture; render the "
            "cohort again with tissue_map=true"
        )
    return TissueMap(zones)
