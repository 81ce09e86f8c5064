"""The tiles of annotated fields: where they are, which of them hold a mitosis, and their pixels,
read from the field when they are asked for.

UTS writes every tile as a PNG and then keeps all of them in memory (23 GB for TUPAC16, 35 GB for
MIDOG21). Here a tile is a corner in a field.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from detection_kd.fields.open_fields import OpenFields
from detection_kd.fields.tiling import place_tiles
from detection_kd.mitosis_sets.checked_fields import PIXEL, explain_unknown_mpp, move_inside
from detection_kd.mitosis_sets.point_set import MITOSIS, PointSet
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.tiles.grid import make_tile_geometry, read_tile

UNKNOWN = -1
"""Label of the tiles of a field where nobody looked for mitoses."""

StainMap = Callable[[UInt8[np.ndarray, "s s 3"], int], UInt8[np.ndarray, "s s 3"]]
"""(tile, number of its field) -> the tile with other colours."""


class FieldTiles:
    """All tiles of a set of fields, field by field and row by row.

    Attributes:
        fields: the fields that have tiles.
        geometries: how the tiles of each field are read; `patch_size_level0` is what a tile covers
            of the field, px, and `mpp` the field's resolution (0: unknown).
        side: of a tile as it is read, px.
        field: int64 (N,), number of each tile's field.
        corners: int64 (N, 2), (x, y) of each tile in px of its field.
        labels: int64 (N,), 1 where a mitosis lies inside, 0 where none does, `UNKNOWN` in fields
            without annotation.
        weights: float32 (N,), of each tile in a loss.
        stain: what is done to the colours of a tile that was read; None: nothing.
    """

    def __init__(
        self,
        points: PointSet,
        side: int,
        mpp: float | None,
        overlap: float = 0.0,
        *,
        unannotated: bool = False,
    ) -> None:
        """Place tiles of `side` px at `mpp` um per px (None: each field's own resolution).

        Args:
            points: the fields, whose files are opened for their sizes.
            side, mpp: of the tiles as they are read.
            overlap: share of the side that neighbours have in common.
            unannotated: also place tiles in fields without annotation, to detect in them.

        Raises:
            UserError: a file that is not there or cannot be opened; a field of unknown resolution
                while `mpp` is given, or of one that is too coarse for it; a point outside.
        """
        self.side, self.mpp = side, mpp
        self.fields = tuple(field for field in points.fields if field.annotated or unannotated)
        self.stain: StainMap | None = None
        self._files = OpenFields(self.fields)
        self.geometries: list[TileGeometry] = []
        self._points: list[Float[np.ndarray, "n 2"]] = []
        placed = []
        for number, field in enumerate(self.fields):
            slide = self._files.get(number)
            if mpp is not None and not slide.mpp:
                raise explain_unknown_mpp(field.field_id)
            geometry = make_tile_geometry(slide, side, mpp, overlap)
            size = (geometry.level0_width, geometry.level0_height)
            self.geometries.append(geometry)
            where = f"field {field.field_id}"
            self._points.append(move_inside(field.points, size, PIXEL, where))
            placed.append(place_tiles(*size, geometry.patch_size_level0, geometry.step))
        self._files.close()
        counts = [len(corners) for corners in placed]
        self.field = np.repeat(np.arange(len(placed), dtype=np.int64), counts)
        self.corners = np.concatenate(placed or [np.empty((0, 2), np.int64)])
        self.labels = np.concatenate([*self._find_labels(placed), np.empty(0, np.int64)])
        self.weights = np.ones(len(self.field), np.float32)

    def __len__(self) -> int:
        return len(self.field)

    def _find_labels(
        self, placed: Sequence[Int[np.ndarray, "_ 2"]]
    ) -> Iterator[Int[np.ndarray, " _"]]:
        for number, (field, corners) in enumerate(zip(self.fields, placed)):
            labels = np.full(len(corners), 0 if field.annotated else UNKNOWN, np.int64)
            for point in self._points[number][field.labels == MITOSIS]:
                labels[self._covers(number, corners, point)] = 1
            yield labels

    def _covers(
        self, number: int, corners: Int[np.ndarray, "#k 2"], points: Float[np.ndarray, "*#k 2"]
    ) -> Bool[np.ndarray, " k"]:
        """Whether points of a field lie in tiles of it, one to one; a tile covers [x, x + side)."""
        extent = self.geometries[number].patch_size_level0
        return ((corners <= points) & (points < corners + extent)).all(-1)

    @property
    def sample_ids(self) -> list[str]:
        """`<field_id>_<x>_<y>` of every tile; the same whatever else is in the set."""
        return [
            f"{self.fields[field].field_id}_{x}_{y}"
            for field, (x, y) in zip(self.field.tolist(), self.corners.tolist())
        ]

    def points(self, tile: int) -> Float[np.ndarray, "m 2"]:
        """(x, y) of all annotated points in a tile, px of the tile."""
        number = int(self.field[tile])
        inside = self._points[number][self._inside(tile)]
        return (inside - self.corners[tile]) * self._scale(number)

    def point_labels(self, tile: int) -> Int[np.ndarray, " m"]:
        """`MITOSIS` or `LOOK_ALIKE` of the same points."""
        return self.fields[self.field[tile]].labels[self._inside(tile)]

    def mitoses(self, tile: int) -> Float[np.ndarray, "m 2"]:
        """(x, y) of the mitoses in a tile, px of the tile."""
        return self.points(tile)[self.point_labels(tile) == MITOSIS]

    def to_field(self, tile: int, points: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 2"]:
        """Positions in px of a tile as positions in px of its field."""
        return self.corners[tile] + points / self._scale(int(self.field[tile]))

    def _inside(self, tile: int) -> Bool[np.ndarray, " n"]:
        number = int(self.field[tile])
        return self._covers(number, self.corners[tile : tile + 1], self._points[number])

    def _scale(self, number: int) -> float:
        return self.side / self.geometries[number].patch_size_level0

    def read(self, tile: int) -> UInt8[np.ndarray, "s s 3"]:
        """The pixels of a tile, with other colours where `stain` is set; white beyond the field.

        Raises:
            SlideError: they cannot be read.
        """
        number = int(self.field[tile])
        pixels = self.read_plain(number, self.corners[tile])
        return pixels if self.stain is None else self.stain(pixels, number)

    def read_plain(
        self, number: int, corner: np.ndarray | Sequence[int]
    ) -> UInt8[np.ndarray, "s s 3"]:
        """A tile of field `number` anywhere, in the field's own colours."""
        x, y = map(int, corner)
        return read_tile(self._files.get(number), self.geometries[number], x, y)

    def select(
        self,
        tiles: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"],
        labels: Int[np.ndarray, " k"] | None = None,
        weights: Float[np.ndarray, " k"] | None = None,
    ) -> FieldTiles:
        """Some of the tiles, with other labels and weights where they are given."""
        chosen = copy.copy(self)
        chosen._files = OpenFields(self.fields)
        chosen.field, chosen.corners = self.field[tiles], self.corners[tiles]
        chosen.labels = self.labels[tiles] if labels is None else labels.astype(np.int64)
        chosen.weights = self.weights[tiles] if weights is None else weights.astype(np.float32)
        assert len(chosen.labels) == len(chosen.weights) == len(chosen)
        return chosen
