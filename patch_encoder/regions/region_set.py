"""A folder of region files as one numbered set: what every store agrees on.

Regions are numbered slide by slide, in the order of slide ids. The digest of the set names its
namespace in Redis and stands in checkpoints: files of other bags, another grid or another
selection of slides have another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int32, Int64
from torch import Tensor

from patch_encoder.bags.bag import open_bag
from patch_encoder.regions.feature_table import FeatureTable
from patch_encoder.regions.files import REMEDY, RegionFile, measure_tiles, read_region_file
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import sha256_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RegionSet:
    """Regions of N slides, R in all; slides without a region are left out.

    Attributes:
        folder: of the files; empty for a set that was made in memory.
        slides: slide ids, sorted.
        counts: (N,) regions of each slide.
        cases: patient of each slide; the slide id where nobody names one.
        digest: of everything that a store hands out.
        digests: of each slide's regions.
        namespace: digest of the folder's full set, of which the slides may be a selection.
        numbers: (R,) number of each region in the full set.
        rows: (R, G, G) row of each cell's tile in its slide's table, -1 where there is none.
        corners: (R, 2) level-0 corners (x, y).
        mean, std: (N, D) of each slide's tiles.
        geometries: how the tiles of each slide are read.
        region_sizes: side of a region in level-0 pixels, of each slide.
        encoder: name of the encoder of the features.
        tables: where the features of each slide lie; none for a set that was made in memory.
    """

    folder: str
    slides: list[str]
    counts: Int64[np.ndarray, " n"]
    cases: list[str]
    digest: str
    digests: list[str]
    namespace: str
    numbers: Int64[np.ndarray, " r"]
    rows: Int32[np.ndarray, "r g g"]
    corners: Int64[np.ndarray, "r 2"]
    mean: Float32[np.ndarray, "n d"]
    std: Float32[np.ndarray, "n d"]
    geometries: list[TileGeometry]
    region_sizes: list[int]
    encoder: str
    tables: list[FeatureTable]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def region_tiles(self) -> int:
        """Side of a region in tiles, G."""
        return self.rows.shape[1]

    @property
    def width(self) -> int:
        """Features of a tile, D."""
        return self.mean.shape[1]

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " n+1"]:
        """Number of the first region of each slide, and of the end."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    @cached_property
    def slide_of(self) -> Int64[np.ndarray, " r"]:
        """Slide of each region."""
        return np.repeat(np.arange(len(self.slides)), self.counts)

    def region_numbers(self, slide: int) -> np.ndarray:
        """Numbers of the regions of a slide."""
        return np.arange(self.offsets[slide], self.offsets[slide + 1])

    def describe(self, region: int) -> str:
        """A region as messages name it."""
        slide = int(self.slide_of[region])
        inside = region - int(self.offsets[slide])
        return f"region {region} ({inside} of {self.counts[slide]} of slide {self.slides[slide]})"


def read_region_set(
    folder: str | Path,
    takes: Callable[[str], bool] = lambda slide_id: True,
    cases: Mapping[str, str] | None = None,
    features: str | Path = "",
) -> RegionSet:
    """Read the region files of a folder and check the bags that they point to.

    Args:
        folder: `<regions>/<encoder>`.
        takes: which slides are wanted; all files are read, since they name the namespace.
        cases: slide id -> patient.
        features: folder of the bags, where they moved since the regions were built.

    Raises:
        UserError: no regions, files of different encoders or grids, damaged files, bags that are
            gone or changed.
    """
    paths = sorted(Path(folder).glob("[!.]*.h5"), key=lambda path: path.stem)
    if not paths:
        raise UserError(
            f"regions={folder}: expected <slide>.h5 of build_regions, found none; give the folder "
            "of one encoder, <output>/<encoder>"
        )
    files = [read_region_file(path) for path in paths]
    _check_alike(files)
    empty = [file.slide_id for file in files if not len(file.rows)]
    if empty:
        line = "regions: %d of %d slides have no region and are left out: %s"
        logger.warning(line, len(empty), len(files), ", ".join(empty[:5]))
    files = [file for file in files if len(file.rows)]
    if not files:
        raise UserError(f"regions={folder}: expected regions, found none in {len(paths)} slides")
    starts = np.cumsum([0, *(len(file.rows) for file in files)])
    kept = [number for number, file in enumerate(files) if takes(file.slide_id)]
    if not kept:
        raise UserError(f"slides_list: expected slides with regions in {folder}, found none")
    numbers = [np.arange(starts[number], starts[number + 1]) for number in kept]
    namespace = _digest(files)
    files = [files[number] for number in kept]
    return RegionSet(
        folder=str(folder),
        slides=[file.slide_id for file in files],
        counts=np.array([len(file.rows) for file in files]),
        cases=[(cases or {}).get(file.slide_id, file.slide_id) for file in files],
        digest=_digest(files),
        digests=[file.digest for file in files],
        namespace=namespace,
        numbers=np.concatenate(numbers),
        rows=np.concatenate([_table_rows(file) for file in files]),
        corners=np.concatenate([file.corners for file in files]),
        mean=np.stack([file.mean for file in files]),
        std=np.stack([file.std for file in files]),
        geometries=[file.geometry for file in files],
        region_sizes=[file.region_size_level0 for file in files],
        encoder=files[0].encoder,
        tables=[_find_table(file, features) for file in files],
    )


def make_region_set(
    features: Float16[Tensor, "r g g d"],
    valid: Bool[Tensor, "r g g"],
    slides: Sequence[str],
    counts: Sequence[int],
    corners: Int64[np.ndarray, "r 2"] | None = None,
    cases: Sequence[str] = (),
) -> RegionSet:
    """A set that is in no file; its rows count the cells of `features`, region by region."""
    rows = torch.arange(valid.numel()).view(valid.shape).masked_fill(~valid, -1).int().numpy()
    ends, tiles = np.cumsum(counts), features.flatten(0, 2)
    parts = np.split(rows, ends[:-1])
    scales = [measure_tiles(tiles, part[part >= 0]) for part in parts]
    names = json.dumps([list(slides), [int(count) for count in counts]])
    digest = sha256_bytes(names.encode(), rows.tobytes(), features.numpy().tobytes())
    return RegionSet(
        folder="",
        slides=list(slides),
        counts=np.asarray(counts, np.int64),
        cases=list(cases or slides),
        digest=digest,
        digests=[f"{digest} {slide}" for slide in slides],
        namespace=digest,
        numbers=np.arange(len(rows)),
        rows=rows,
        corners=np.zeros((len(rows), 2), np.int64) if corners is None else corners,
        mean=np.stack([mean for mean, _ in scales]),
        std=np.stack([std for _, std in scales]),
        geometries=[],
        region_sizes=[],
        encoder="",
        tables=[],
    )


def _digest(files: Sequence[RegionFile]) -> str:
    return sha256_bytes(*(file.digest.encode() for file in files))


def _check_alike(files: Sequence[RegionFile]) -> None:
    first = files[0]
    for file in files:
        for what, one, other in (
            ("encoder", first.encoder, file.encoder),
            ("region_tiles", first.region_tiles, file.region_tiles),
            ("features of a tile", len(first.mean), len(file.mean)),
        ):
            if one != other:
                raise UserError(
                    f"{file.path}: expected {what} {one} as in {first.path.name}, found {other}; "
                    "keep the regions of each encoder and grid in a folder of their own"
                )


def _table_rows(file: RegionFile) -> np.ndarray:
    """Rows of the table: of the bag, or of the features in the file itself, region by region."""
    if file.offset is None:
        return file.rows
    cells = np.arange(file.rows.size, dtype=np.int32).reshape(file.rows.shape)
    return np.where(file.rows >= 0, cells, -1).astype(np.int32)


def _find_table(file: RegionFile, features: str | Path) -> FeatureTable:
    width = len(file.mean)
    if file.offset is not None:
        return FeatureTable(file.path, (file.rows.size, width), "float16", file.offset)
    path = file.path.parent / file.bag
    if features:
        name = Path(file.bag).name
        places = (Path(features) / Path(file.bag).parent.name / name, Path(features) / name)
        path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise UserError(
            f"{file.path}: expected the bag {path}, found none; give features=<folder of the bags>"
        )
    bag = open_bag(path)
    stored = bag.provenance.get("sha256", file.settings["bag_sha256"])
    if bag.shape[1] != width or stored != file.settings["bag_sha256"]:
        raise DamagedFile(f"{path}: expected the bag that {file.path} was built from; {REMEDY}")
    if int(file.rows.max()) >= len(bag):
        raise DamagedFile(f"{path}: expected more than {file.rows.max()} tiles, found {len(bag)}")
    return FeatureTable(path, bag.shape, bag.dtype, bag.offset)
