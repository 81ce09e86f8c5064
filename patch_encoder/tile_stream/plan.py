"""Which tile is drawn: a pure function of the seed and of the tile's number in the whole training.

The numbers 0, 1, 2, ... are cut into blocks. A block holds `open_slides` visits, and a visit draws
`tiles_per_visit` tiles from one slide, which is opened once for them; the tiles of a block stand in
a random order, so that a batch mixes slides. Tile i is found without the ones before it, by any
process: the number of processes and workers, and where a run was resumed, change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tile_stream.tissue_cover import TissueCover
from wsi_common.counters import hash_counters, permutation, uniform
from wsi_common.errors import UserError

BALANCES = ("tiles", "slides", "subdatasets")
# what random numbers are for; views have theirs at (seed, number of the tile)
ORDER, VISIT, RETRY, PLACE = range(1 << 33, (1 << 33) + 4)
PLACES = 32  # positions that are tried until enough of one is tissue
SHARD = 32  # tiles that a cache keeps in one file
COARSER = 1.1  # a slide with pixels up to this much larger than wanted still serves


class Draw(NamedTuple):
    """A square of a slide that is to be read.

    Attributes:
        index: number of the tile in the training.
        attempt: how many draws of this index could not be read before.
        slide: index of its source.
        tile: number of the stored tile that it starts from.
        x, y: top-left corner, level-0 px.
        side: level-0 px.
        mpp: um per px of the tile; 0: what the slide was tiled at.
    """

    index: int
    attempt: int
    slide: int
    tile: int
    x: int
    y: int
    side: int
    mpp: float


@dataclass(frozen=True)
class TilePlan:
    """The draws of a training.

    Attributes:
        sources: the corpus.
        seed: of all draws.
        tile_size: side of a tile as it is handed out, px.
        balance: every `tiles` is equally likely, every one of `slides`, or every one of
            `subdatasets`, and in it every tile.
        mpps: resolutions of the tiles, um per px; (): as each slide was tiled.
        mpp_weights: how often each of them is drawn; (): equally often.
        jitter: largest offset from a stored tile along either axis, in sides of a stored tile.
        tissue_share: least share of a tile that stored tiles cover.
        open_slides, tiles_per_visit: visits of a block, and tiles of a visit.
        dropped: sources that are left out.
        shard: tiles of a shard of a slide, from one of which a visit draws, so that a cache keeps
            them together; 0: no shards.

    Raises:
        UserError: values out of range, or no slide is left to draw from.
    """

    sources: Sequence[TileSource]
    seed: int = 0
    tile_size: int = 256
    balance: str = "tiles"
    mpps: tuple[float, ...] = ()
    mpp_weights: tuple[float, ...] = ()
    jitter: float = 0.5
    tissue_share: float = 0.4
    open_slides: int = 16
    tiles_per_visit: int = 8
    dropped: frozenset[int] = frozenset()
    shard: int = 0

    def __post_init__(self) -> None:
        _check(self)
        for mpp, weights in zip(self.mpps or (0.0,), self._weights, strict=True):
            if not weights[-1] > 0:
                at = f" at {mpp:g} um per px or finer" if mpp else ""
                remedy = "mend the slides" + (", or leave this value out of mpps" if mpp else "")
                raise UserError(
                    f"expected slides to draw tiles from, found none{at} of {len(self.sources)} "
                    f"({len(self.dropped)} left out since they cannot be read); {remedy}"
                )

    @property
    def block(self) -> int:
        """Tiles of a block."""
        return self.open_slides * self.tiles_per_visit

    def without(self, slides: Sequence[int]) -> TilePlan:
        """The plan that draws from the other slides only; indices of sources stay."""
        return replace(self, dropped=self.dropped | set(slides))

    def count_left_out(self) -> dict[float, int]:
        """Resolution -> number of slides that are too coarse for it."""
        serve = (self._resolutions <= mpp * COARSER for mpp in self.mpps)
        return {mpp: int((~taken).sum()) for mpp, taken in zip(self.mpps, serve, strict=True)}

    def visit(self, index: int) -> int:
        """Number of the visit that draws a tile; those of one visit are of one slide."""
        block, place = divmod(index, self.block)
        slot = _order(self.seed, block, self.block)[place]
        return block * self.open_slides + slot // self.tiles_per_visit

    def draw(self, index: int, attempt: int = 0) -> Draw:
        """The tile of a number; `attempt` counts its draws that could not be read."""
        if attempt == 0:
            state = hash_counters(self.seed, VISIT, self.visit(index))
        else:
            state = hash_counters(self.seed, RETRY, index, attempt)
        resolution = 0
        if self.mpps:
            resolution = _pick(self._mpp_weights, uniform(state, 0))
        slide = _pick(self._weights[resolution], uniform(state, 1))
        mpp = self.mpps[resolution] if self.mpps else 0.0
        tiles = range(len(self._covers[slide].corners))
        if self.shard:
            tiles = self.tiles_of(slide, int(uniform(state, 2) * self._shards(slide)))
        return self._place(Draw(index, attempt, slide, 0, 0, 0, 0, mpp), tiles)

    def _place(self, draw: Draw, tiles: Sequence[int]) -> Draw:
        """The draw at a random place near one of the tiles where enough is tissue; the best of
        `PLACES` where nothing is.
        """
        cover = self._covers[draw.slide]
        state = hash_counters(self.seed, PLACE, draw.index, draw.attempt)
        best, best_share = draw, -1.0
        for number in range(0, 3 * PLACES, 3):
            tile = tiles[int(uniform(state, number) * len(tiles))]
            across, down = (2 * uniform(state, number + axis) - 1 for axis in (1, 2))
            found = self.at_tile(draw, tile, self.jitter * across, self.jitter * down)
            x, y, side = found.x, found.y, found.side
            left, top = cover.corners[tile].tolist()
            share = cover.share_of_one(left, top, x, y, side)
            if share < self.tissue_share:
                share = cover.share(x, y, side)
            if share >= self.tissue_share:
                return found
            if share > best_share:
                best, best_share = found, share
        return best

    def at_tile(self, draw: Draw, tile: int, across: float = 0.0, down: float = 0.0) -> Draw:
        """The draw around the centre of a stored tile, moved by shares of the tile's side."""
        source = self.sources[draw.slide]
        stored = source.coordinates.geometry.patch_size_level0
        side = _side_at(source, self.tile_size, draw.mpp)
        left, top = self._covers[draw.slide].corners[tile].tolist()
        centred = (stored - side) / 2
        x, y = round(left + centred + stored * across), round(top + centred + stored * down)
        x, y = self._clip(draw.slide, x, y, side)
        return draw._replace(tile=tile, x=x, y=y, side=side)

    def _shards(self, slide: int) -> int:
        return -(-len(self._covers[slide].corners) // self.shard)

    def tiles_of(self, slide: int, shard: int) -> range:
        """Numbers of the tiles of a shard: spread over the slide."""
        return range(shard, len(self._covers[slide].corners), self._shards(slide))

    def shard_of(self, slide: int, tile: int) -> tuple[int, int]:
        """(shard, number in it) of a tile."""
        return tile % self._shards(slide), tile // self._shards(slide)

    def _clip(self, slide: int, x: int, y: int, side: int) -> tuple[int, int]:
        """The nearest square inside the slide; one that is larger than the slide is centred."""
        low, high = self._bounds[slide]
        clipped = []
        for value, start, end in zip((x, y), low, high, strict=True):
            room = end - start - side
            clipped.append(min(max(value, start), start + room) if room >= 0 else start + room // 2)
        return clipped[0], clipped[1]

    @cached_property
    def _covers(self) -> list[TissueCover]:
        return [
            TissueCover(source.coordinates.coords, source.coordinates.geometry.patch_size_level0)
            for source in self.sources
        ]

    @cached_property
    def _bounds(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(left, top), (right, bottom) of each slide; of its tiles where its size is unknown."""
        bounds = []
        for source in self.sources:
            corners, geometry = source.coordinates.coords, source.coordinates.geometry
            low, high = (0, 0), (geometry.level0_width, geometry.level0_height)
            if not all(high):
                low = tuple(corners.min(0).tolist())
                high = tuple((corners.max(0) + geometry.patch_size_level0).tolist())
            bounds.append((low, high))
        return bounds

    @cached_property
    def _mpp_weights(self) -> np.ndarray:
        return np.cumsum(self.mpp_weights or [1.0] * len(self.mpps))

    @cached_property
    def _weights(self) -> list[np.ndarray]:
        """For each resolution, the sums of the weights of the slides up to each one."""
        weights = _weigh(self.sources, self.balance)
        weights[list(self.dropped)] = 0.0
        if not self.mpps:
            return [np.cumsum(weights)]
        serve = (self._resolutions <= mpp * COARSER for mpp in self.mpps)
        return [np.cumsum(np.where(taken, weights, 0.0)) for taken in serve]

    @cached_property
    def _resolutions(self) -> np.ndarray:
        """um per level-0 px of each slide; NaN where it is unknown."""
        return np.array([source.mpp for source in self.sources], dtype=float)


@lru_cache(maxsize=256)
def _order(seed: int, block: int, size: int) -> list[int]:
    return permutation(hash_counters(seed, ORDER, block), size).tolist()


def _pick(sums: np.ndarray, share: float) -> int:
    """The entry whose part of the whole a share in [0, 1) falls into; never one of weight 0."""
    place = int(np.searchsorted(sums, share * sums[-1], side="right"))
    return min(place, int(np.searchsorted(sums, sums[-1])))


def _side_at(source: TileSource, tile_size: int, mpp: float) -> int:
    """Side of a tile in level-0 px."""
    geometry = source.coordinates.geometry
    scale = geometry.patch_size_level0 / geometry.target_size
    if mpp:
        assert source.mpp, "slides of unknown resolution are left out where it is needed"
        scale = mpp / source.mpp
    return max(1, round(tile_size * scale))


def _weigh(sources: Sequence[TileSource], balance: str) -> np.ndarray:
    """How likely each slide is, up to a factor."""
    tiles = np.array([len(source.coordinates.coords) for source in sources], dtype=float)
    if balance == "slides":
        return np.ones(len(sources))
    if balance == "subdatasets":
        names = [source.subdataset for source in sources]
        members = np.unique(names, return_inverse=True)[1]
        return tiles / np.bincount(members, tiles)[members]
    return tiles


def _check(plan: TilePlan) -> None:
    if plan.balance not in BALANCES:
        raise UserError(f"balance={plan.balance}: expected one of {', '.join(BALANCES)}")
    weights = plan.mpp_weights
    if weights and (len(weights) != len(plan.mpps) or min(weights) < 0 or not sum(weights)):
        raise UserError(
            f"mpp_weights={list(weights)}: expected a number of at least 0 for each of "
            f"mpps={list(plan.mpps)}"
        )
    if any(not mpp > 0 for mpp in plan.mpps):
        raise UserError(f"mpps={list(plan.mpps)}: expected um per px above 0")
    if not (0 <= plan.jitter <= 1 and 0 <= plan.tissue_share <= 1):
        raise UserError(
            f"jitter={plan.jitter:g}, tissue_share={plan.tissue_share:g}: expected shares, 0 to 1"
        )
    if plan.shard and plan.jitter:
        raise UserError(
            f"jitter={plan.jitter:g}: expected jitter=0 with cache_dir, since tiles are kept where "
            "they were stored"
        )
    counts = {name: getattr(plan, name) for name in ("tile_size", "open_slides", "tiles_per_visit")}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count}: expected at least 1")
