"""A cell of the table: one embedding of all regions of a cohort, its measures and its bags.

A cell is stored under the settings that it was made with, so that a study that was stopped goes on
where it was, and one with other settings is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patch_encoder.bags.writer import write_bag
from patch_encoder.demo.cytology.tissue_map import label_squares, read_tissue_map
from patch_encoder.prototypes.region_batches import read_batches
from patch_encoder.prototypes.region_encoder import build_region_encoder
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_probe import read_zones
from patch_encoder.regions.store import RegionStore
from patch_encoder.tiles.coordinates import TileGeometry
from studies.region_tables.intervals import NO_SEED, SlideScores
from studies.region_tables.measures import MEASURES, describe_spread, measure_embeddings
from wsi_common.device import pick_device
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json
from wsi_common.provenance import can_reuse

BLOCK = 256  # regions of a forward pass
TABLE, MAPS = "zones.csv", "zones"  # where a cohort says which zones its regions are of


@dataclass(frozen=True)
class Condition:
    """What all rows of one table have in common.

    Attributes:
        cohort: name of the cohort, such as `nu0.5`.
        folder: of the cohort, with labels.csv, and zones.csv or zones/.
        regions: folder of its region files.
        standardise: of the store, `none` or `slide`.
        trained: whether networks are trained; else there is the row of the tile mean alone.
        baselines: name -> region files of further tile encoders, of which the tile means are rows.
    """

    cohort: str
    folder: Path
    regions: Path
    standardise: str
    trained: bool
    baselines: Mapping[str, Path]

    @property
    def name(self) -> str:
        """As part of a path."""
        return f"{self.cohort}_{'raw' if self.standardise == 'none' else 'standardised'}"

    @property
    def labels(self) -> Path:
        """The table of slides and patients."""
        return self.folder / "labels.csv"


@dataclass(frozen=True)
class Cell:
    """A row of a condition for one seed: where it is stored, and what decides its content."""

    row: str
    seed: int
    path: Path
    bags: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the feature set."""
        return self.row if self.seed == NO_SEED else f"{self.row}_s{self.seed}"

    def is_done(self, overwrite: bool) -> bool:
        """Whether it was made with these settings.

        Raises:
            UserError: it was made with others.
        """
        return can_reuse(
            self.path,
            lambda: read_json(self.path, "a cell of a study")["settings"],
            dict(self.settings),
            "a cell of other settings",
            overwrite=overwrite,
        )

    def read(self) -> SlideScores:
        """Its measures."""
        content = read_json(self.path, "a cell of a study")
        values = {name: np.array(content["measures"][name], np.float64) for name in MEASURES}
        return SlideScores(np.array(content["cases"]), values)


def make_cell(
    cell: Cell,
    store: RegionStore,
    zones: np.ndarray,
    embeddings: Float[Tensor, "m w"],
    clusters: int,
) -> None:
    """Write the bags of an embedding, one row per region, and then its measures."""
    ends = store.regions.offsets
    for number, slide_id in enumerate(store.slides):
        side = store.regions.region_sizes[number]
        geometry = store.regions.geometries[number]
        size = (geometry.level0_width, geometry.level0_height)
        region = TileGeometry(slide_id, side, side, 0, side, 0.0, geometry.mpp, 0.0, *size)
        rows = embeddings[ends[number] : ends[number + 1]].numpy()
        path = cell.bags / "h5_files" / f"{slide_id}.h5"
        write_bag(path, rows, store.corners(number), asdict(region), {"encoder": cell.name})
    values = measure_embeddings(embeddings, zones, store.counts, store.cases, clusters)
    content = {
        "settings": dict(cell.settings),
        "spread": describe_spread(embeddings),
        "slides": store.slides,
        "cases": list(store.cases),
        "measures": {name: found.tolist() for name, found in values.items()},
    }
    write_json(cell.path, content)


def find_zones(store: RegionStore, folder: Path) -> Int[np.ndarray, " m"]:
    """The index of the zone of each region: of the cohort's zones.csv, else of the tissue maps of
    a rendered cohort, where a region is of the zone that covers most of it.

    Raises:
        UserError: a table without some of the regions, which would be taken for a zone.
    """
    if (folder / TABLE).is_file():
        named = read_zones(str(folder / TABLE), store).astype(str)
        if (absent := np.flatnonzero(named == "")).size:
            raise UserError(
                f"{folder / TABLE}: expected the zone of each of {len(named)} regions, found none "
                f"for {len(absent)}, first {store.regions.describe(int(absent[0]))}; add their "
                "rows, or take these slides out of the cohort"
            )
        return np.unique(named, return_inverse=True)[1]
    found = []
    for number, (slide_id, side) in enumerate(
        zip(store.slides, store.regions.region_sizes, strict=True)
    ):
        tissue = read_tissue_map(folder / MAPS / f"{slide_id}.png")
        found.append(label_squares(tissue, store.corners(number), side))
    return np.concatenate(found)


@torch.no_grad()
def average_tiles(store: RegionStore) -> Float[Tensor, "m d"]:
    """The mean of the valid tiles of each region."""
    found = []
    for batch in _read(store, torch.device("cpu")):
        tiles, valid = batch.features.float(), batch.valid[..., None].float()
        found.append((tiles * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1))
    return torch.cat(found)


@torch.no_grad()
def encode(store: RegionStore, weights: Path) -> Float[Tensor, "m w"]:
    """The embeddings of a trained region encoder, or of the file of one, on full regions."""
    device = pick_device("auto")
    network = build_region_encoder(weights)[0].to(device)
    return torch.cat(
        [network(pack_regions(b.features, b.valid)).float().cpu() for b in _read(store, device)]
    )


def _read(store: RegionStore, device: torch.device) -> Any:
    total = len(store)
    blocks = np.array_split(np.arange(total), range(BLOCK, total, BLOCK))
    return read_batches(store, blocks, device)
