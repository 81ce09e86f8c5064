"""Batches of regions: one `fetch` for every back end, with the same bits from each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int64
from torch import Tensor

from patch_encoder.regions.files import gather_tiles
from patch_encoder.regions.region_set import RegionSet, make_region_set
from wsi_common.errors import UserError
from wsi_common.memory import free_memory

STANDARDISE = ("none", "slide")
MAX_HALF = torch.finfo(torch.float16).max


class RegionStore(ABC):
    """Regions of a set, by number. It can be pickled; every process opens its own files.

    Args:
        regions: the set.
        standardise: "slide" subtracts from each feature the mean of its slide's tiles and divides
            by their standard deviation, which takes the offset of a slide's stain away.
    """

    def __init__(self, regions: RegionSet, standardise: str = "none") -> None:
        assert standardise in STANDARDISE, standardise
        self.regions = regions
        self.standardise = standardise
        self._opened: dict[Any, Any] = {}  # files or connections of this process

    @property
    def slides(self) -> list[str]:
        """Slide ids, sorted."""
        return self.regions.slides

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """Regions of each slide."""
        return self.regions.counts

    @property
    def cases(self) -> list[str]:
        """Patient of each slide."""
        return self.regions.cases

    @property
    def digest(self) -> str:
        """Digest of the set, for checkpoints."""
        return self.regions.digest

    @property
    def region_tiles(self) -> int:
        """Side of a region in tiles, G."""
        return self.regions.region_tiles

    @property
    def width(self) -> int:
        """Features of a tile, D."""
        return self.regions.width

    def __len__(self) -> int:
        return len(self.regions)

    def fetch(
        self, ids: Int64[np.ndarray, " b"]
    ) -> tuple[Float16[Tensor, "b g g d"], Bool[Tensor, "b g g"]]:
        """Features and validity of the regions `ids`, in that order; tiles that are not there are
        zero and False.
        """
        ids = np.asarray(ids, np.int64)
        assert ids.ndim == 1 and (not len(ids) or 0 <= ids.min() <= ids.max() < len(self)), ids
        side, valid = self.region_tiles, torch.from_numpy(self.regions.rows[ids] >= 0)
        features = self._read(ids).view(len(ids), side, side, self.width)
        if self.standardise == "slide":
            features = self._standardise(features, valid, self.regions.slide_of[ids])
        return features, valid

    def corners(self, slide: int) -> Int64[np.ndarray, "m 2"]:
        """Level-0 corners (x, y) of the regions of a slide."""
        return self.regions.corners[self.regions.region_numbers(slide)]

    def close(self) -> None:
        """Give back files and connections; the next `fetch` opens them again."""
        self._opened.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is opened: a pickle would copy it."""
        return self.__dict__ | {"_opened": {}}

    @abstractmethod
    def _read(self, ids: np.ndarray) -> Float16[Tensor, "b *cells d"]:
        """The stored features of regions, zero where there is no tile."""

    def _standardise(self, features: Tensor, valid: Tensor, slides: np.ndarray) -> Tensor:
        """(x - mean) / std in single precision, rounded to half; the same for all back ends."""
        mean, std = (
            torch.from_numpy(table[slides])[:, None, None, :]
            for table in (self.regions.mean, self.regions.std)
        )
        values = features.float().sub_(mean).div_(std).clamp_(-MAX_HALF, MAX_HALF)
        return values.masked_fill_(~valid[..., None], 0.0).half()

    def __enter__(self) -> RegionStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RamStore(RegionStore):
    """All tiles of the set in memory, in half precision; each tile once.

    Args:
        regions: the set.
        standardise: as RegionStore.
        tiles: (n, D) features that the rows of the set count, where it is in no file.

    Raises:
        UserError: the tiles need more memory than is free.
    """

    def __init__(
        self, regions: RegionSet, standardise: str = "none", tiles: Tensor | None = None
    ) -> None:
        super().__init__(regions, standardise)
        self._rows = regions.rows
        self._tiles = tiles.half() if tiles is not None else self._load()

    def _load(self) -> Tensor:
        """Read the tiles of every slide, and let the rows count over all of them."""
        regions = self.regions
        used = [
            np.unique(rows[rows >= 0]) for rows in np.split(regions.rows, regions.offsets[1:-1])
        ]
        needed, free = 2 * self.width * sum(map(len, used)), free_memory()
        if needed > free:
            raise UserError(
                f"store=ram: expected {needed / 2**30:.1f} GiB of memory for {len(regions)} "
                f"regions, found {free / 2**30:.1f} GiB free; set store=hdf5 or store=redis"
            )
        tiles = torch.empty(sum(map(len, used)), self.width, dtype=torch.float16)
        numbers, start = np.full(regions.rows.shape, -1, np.int32), 0
        for slide, rows in enumerate(used):
            gather_tiles(regions.tables[slide].open(), rows, out=tiles[start : start + len(rows)])
            here = slice(regions.offsets[slide], regions.offsets[slide + 1])
            valid = regions.rows[here] >= 0
            numbers[here][valid] = start + np.searchsorted(rows, regions.rows[here][valid])
            start += len(rows)
        self._rows = numbers
        return tiles

    def _read(self, ids: np.ndarray) -> Tensor:
        return gather_tiles(self._tiles, self._rows[ids])


def make_ram_store(
    features: Float16[Tensor, "r g g d"],
    valid: Bool[Tensor, "r g g"],
    slides: Sequence[str],
    counts: Sequence[int],
    corners: Int64[np.ndarray, "r 2"] | None = None,
    cases: Sequence[str] = (),
    standardise: str = "none",
) -> RamStore:
    """A store of regions that are in no file, as a simulation makes them."""
    regions = make_region_set(features, valid, slides, counts, corners, cases)
    return RamStore(regions, standardise, features.flatten(0, 2))


class FileStore(RegionStore):
    """Regions read from the files of a set (`store=hdf5`), through memory maps and in the order in
    which they lie on the disk; what was read lately is in the system's cache.

    Raises:
        UserError: a file that cannot be mapped.
    """

    def __init__(self, regions: RegionSet, standardise: str = "none") -> None:
        super().__init__(regions, standardise)
        for table in regions.tables:
            if not table.is_mappable:
                raise UserError(
                    f"{table.path}: expected features that can be memory-mapped, found chunked or "
                    "compressed ones; build the regions with form=materialised or set store=ram"
                )

    def _read(self, ids: np.ndarray) -> Tensor:
        regions = self.regions
        cells = self.region_tiles**2
        features = torch.empty(len(ids), cells, self.width, dtype=torch.float16)
        for place in np.argsort(ids, kind="stable").tolist():
            region = int(ids[place])
            tiles = self._open(int(regions.slide_of[region]))
            gather_tiles(tiles, regions.rows[region], out=features[place])
        return features

    def _open(self, slide: int) -> Tensor:
        if slide not in self._opened:
            self._opened[slide] = self.regions.tables[slide].open()
        return self._opened[slide]
