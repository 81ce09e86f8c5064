"""What lies on disk of a cohort, one row per slide, and its histograms."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from patch_encoder.bags.layouts import read_layout
from patch_encoder.bags.paths import list_bags
from patch_encoder.tiles.coordinates import coordinate_attributes, read_coordinates
from patch_encoder.tissue.quality import read_quality
from wsi_common.errors import UserError

SAMPLE = 2000  # tiles of a slide that its histograms are drawn from
BINS = 20
PLAUSIBLE = (0.05, 2.0)  # um per pixel at level 0 of any scanner in use


@dataclass
class SlideSummary:
    """One slide.

    Attributes:
        status: ok, no tiles, no bag (fewer bags than feature folders, or of other tiles), failed.
        values: measure -> a sample of its tiles' values.
        bags: feature folder -> tiles of its bag, None when there is none.
    """

    slide: str
    status: str = "ok"
    tiles: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tissue_share: float | None = None
    tissue_mm2: float | None = None
    mpp: float | None = None
    width: int = 0
    height: int = 0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    bags: dict[str, int | None] = field(default_factory=dict)
    label: str = ""
    errors: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Tiles that were dropped by quality."""
        return sum(self.dropped.values())

    def median(self, name: str) -> float | None:
        """Median of a measure over the sampled tiles."""
        values = self.values.get(name)
        return float(np.median(values)) if values is not None and len(values) else None


def read_rows(
    tiles: Path, features: Sequence[str], labels: Mapping[str, str]
) -> list[SlideSummary]:
    """Every slide that has coordinates, a failure or a label, sorted by id.

    Raises:
        UserError: nothing was tiled there.
    """
    rows = {
        path.stem: read_row(path)
        for path in sorted((tiles / "coords").glob("*.h5"))
        if not path.name.startswith(".")
    }
    for folder in (tiles, *map(Path, features)):
        for slide, stage, error in read_failures(folder / "failures.csv"):
            row = rows.setdefault(slide, SlideSummary(slide))
            row.status, row.errors = "failed", [*row.errors, f"{stage}: {error}"]
    if not rows:
        raise UserError(f"tiling={tiles}: expected coords/*.h5 of tile_slides, found none")
    for slide, label in labels.items():
        row = rows.setdefault(
            slide, SlideSummary(slide, "failed", errors=["in labels.csv, but not tiled"])
        )
        row.label = label
    for folder in features:
        _add_bags(rows, folder)
    return [rows[slide] for slide in sorted(rows)]


def read_row(path: Path) -> SlideSummary:
    """One slide's row from its coordinates file; a file that cannot be read gives a failed row."""
    try:
        coordinates, attributes = read_coordinates(path), coordinate_attributes(path)
    except UserError as error:
        return SlideSummary(path.stem, "failed", errors=[str(error)])
    geometry, count = coordinates.geometry, len(coordinates.coords)
    share = float(attributes["tissue_share"]) if attributes.get("tissue_share") else None
    area = geometry.level0_width * geometry.level0_height * geometry.mpp**2 / 1e6
    step = max(1, count // SAMPLE)
    row = SlideSummary(
        path.stem,
        "ok" if count else "no tiles",
        count,
        json.loads(attributes.get("dropped") or "{}"),
        share,
    )
    row.tissue_mm2 = area * share if share is not None and area else None
    row.mpp = geometry.mpp or None
    row.width = geometry.level0_width
    row.height = geometry.level0_height
    row.values = {name: values[::step] for name, values in read_quality(path).items()}
    if row.mpp and not PLAUSIBLE[0] <= row.mpp <= PLAUSIBLE[1]:
        row.errors.append(f"implausible resolution: {row.mpp:g} um per pixel")
    return row


def read_failures(path: Path) -> list[tuple[str, str, str]]:
    """(slide, stage, error) of a failures.csv; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return [
            (row.get("slide", ""), row.get("stage", ""), row.get("error", ""))
            for row in csv.DictReader(stream)
        ]


def _add_bags(rows: dict[str, SlideSummary], folder: str) -> None:
    name, files = Path(folder).name, list_bags(folder)
    for slide, row in rows.items():
        count = bag_size(files[slide]) if slide in files else None
        row.bags[name] = count
        if row.status == "ok" and count != row.tiles:
            row.status = "no bag"
            row.errors.append(
                f"{name}: no bag"
                if count is None
                else f"{name}: a bag of {count} tiles, {row.tiles} were cut"
            )


def bag_size(path: Path) -> int | None:
    """Count a bag's tiles by its header; None when the file is broken."""
    try:
        return read_layout(path).shape[0]
    except UserError:
        return None


def compute_bin_edges(
    rows: Sequence[SlideSummary], name: str, logarithmic: bool
) -> np.ndarray | None:
    """Edges of BINS bins over the middle 98 % of a measure; None when no tile has it."""
    parts = [row.values[name] for row in rows if len(row.values.get(name, ()))]
    if not parts:
        return None
    low, high = np.percentile(np.concatenate(parts), [1, 99])
    if logarithmic:
        low = max(low, 1e-3)
        return np.geomspace(low, max(high, low * 2), BINS + 1)
    return np.linspace(low, max(high, low + 1e-3), BINS + 1)


def histogram(values: np.ndarray, edges: np.ndarray) -> list[int]:
    """Counts; what lies beyond the edges counts in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
