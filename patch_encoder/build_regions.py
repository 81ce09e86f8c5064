"""Make regions of G x G tiles from feature bags, for region encoders; no slide is read.

    python -m patch_encoder.build_regions features=runs/features/uni2_h output=runs/regions
    region_tiles=16

Writes `<output>/<encoder>/<slide_id>.h5` and `<output>/<encoder>/regions.csv`. With form=indexed
the features stay in the bags. Files that are there with the same content are kept, other content is
refused; slides that fail are listed in `failures.csv` and the exit status is 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_encoder.bags.bag import open_bag, slide_grid
from patch_encoder.bags.paths import find_coordinates, list_bags
from patch_encoder.cohort.disk_space import explain_full_disk
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import SelectionKeys
from patch_encoder.regions.files import FORMS, describe_settings, read_region_file, write_regions
from patch_encoder.regions.grid import lay_regions
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import FullDisk, UserError
from wsi_common.files import check_writable, write_csv
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "build_regions"
COLUMNS = ("slide", "tiles", "regions", "fill", "left_out", "shared")
REMEDY = "free some, choose output= on another disk, or set form=indexed"
SHOWN = 10  # slides that a line of the log names


@dataclass
class Config(SelectionKeys):
    """Keys of the making of regions."""

    features: str = key(
        REQUIRED, "folder of feature bags; <features>/<encoder> or its h5_files/", path=True
    )
    output: str = key(REQUIRED, "where the results are written; <encoder>/<slide>.h5", runtime=True)
    region_tiles: int = key(16, "side of a region in tiles, G", least=1)
    stride: int = key(
        0, "tiles from a region to its neighbour; at most region_tiles, and 0 means that", least=0
    )
    min_fill: float = key(0.1, "smallest share of a region's cells that hold a tile", least=0.0)
    form: str = key(
        "indexed",
        "indexed: features stay in the bags; materialised: they are copied in half precision, for "
        "bags that are chunked or compressed",
        choices=FORMS,
    )
    min_regions: int = key(
        32, "regions that a slide needs to be clustered; slides with fewer are listed", runtime=True
    )
    coords: str = key(
        "", "folder of coordinates files; for bags that do not say where their tiles lie", path=True
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def build_slide(config: Config, slide_id: str, file: Path) -> tuple[bool, dict[str, Any]]:
    """Make the regions of one slide: whether something was written, and the slide's row of the
    table.

    Raises:
        UserError: a bag that cannot be read or placed, or regions of another bag or grid are there.
    """
    bag = open_bag(file, find_coordinates(file, config.coords))
    coords = bag.coordinates().coords
    grid = slide_grid(bag)
    assert grid is not None
    regions = lay_regions(coords, grid, config.region_tiles, config.stride, config.min_fill)
    row = {
        "slide": slide_id,
        "tiles": len(bag),
        "regions": len(regions.rows),
        "fill": f"{regions.fill:.3f}",
        "left_out": regions.left_out,
        "shared": regions.shared,
    }
    encoder = str(bag.provenance.get("encoder") or Path(config.features).resolve().name)
    target = Path(config.output) / encoder / f"{slide_id}.h5"
    settings = describe_settings(
        bag, config.form, config.region_tiles, config.stride, config.min_fill
    )
    if can_reuse(
        target,
        lambda: read_region_file(target).settings,
        settings,
        "regions of other settings or another bag",
        overwrite=config.overwrite,
    ):
        return False, row | {"encoder": encoder}
    with explain_full_disk(target.parent, REMEDY):
        write_regions(target, bag, regions, settings, encoder)
    return True, row | {"encoder": encoder}


def log_summary(rows: Sequence[dict[str, Any]], written: int, least: int) -> None:
    """Say how many regions there are, which slides have few, and which tiles are in none."""
    logger.info(
        "%s: %d regions of %d slides (%d written), mean fill %.2f",
        *(STAGE, sum(row["regions"] for row in rows), len(rows), written),
        sum(float(row["fill"]) for row in rows) / max(1, len(rows)),
    )
    few = [f"{row['slide']} ({row['regions']})" for row in rows if row["regions"] < least]
    if few:
        more = f" and {len(few) - SHOWN} more, see regions.csv" if len(few) > SHOWN else ""
        names = ", ".join(few[:SHOWN]) + more
        line = "%s: not clustered, with fewer than %d regions, %d of %d slides: %s"
        logger.warning(line, STAGE, least, len(few), len(rows), names)
    for column, reason in (
        ("left_out", "lie in regions with too few tiles (min_fill)"),
        ("shared", "share a cell of the grid with another tile"),
    ):
        if count := sum(row[column] for row in rows):
            total = sum(row["tiles"] for row in rows)
            logger.warning("%s: %d of %d tiles %s", STAGE, count, total, reason)


def main(config: Config) -> int:
    selection = config.selection()
    if config.suffixes:
        raise UserError("suffixes: a bag does not say how its slide's file ends; use slides_list=")
    if config.stride > config.region_tiles:
        raise UserError(
            f"stride={config.stride}: expected at most region_tiles={config.region_tiles}, or "
            "tiles between the regions would be lost"
        )
    if config.min_fill > 1:
        raise UserError(f"min_fill={config.min_fill:g}: expected a share of a region, 0 to 1")
    found = list_bags(config.features)
    bags = {slide_id: file for slide_id, file in found.items() if selection.takes_id(slide_id)}
    check_writable(config.output)
    failures, rows, written = Failures(STAGE), [], 0
    for slide_id in sorted(selection.names.keys() - bags.keys()):
        failures.add(slide_id, f"in slides_list, but without a bag in {config.features}")
    for slide_id, file in progress(bags.items(), "regions", len(bags), "slides"):
        try:
            new, row = build_slide(config, slide_id, file)
        except FullDisk:
            raise
        except UserError as error:
            failures.add(slide_id, str(error))
            continue
        written += new
        rows.append(row)
    for encoder in sorted({row["encoder"] for row in rows}):
        table = [{name: row[name] for name in COLUMNS} for row in rows if row["encoder"] == encoder]
        write_csv(Path(config.output) / encoder / "regions.csv", COLUMNS, table)
    log_summary(rows, written, config.min_regions)
    if rows and not any(row["regions"] for row in rows):
        raise UserError(
            f"features={config.features}: expected regions, found none in {len(rows)} slides: no "
            f"square of {config.region_tiles} x {config.region_tiles} cells holds a share of "
            f"min_fill={config.min_fill:g} of tiles; lower region_tiles or min_fill, with "
            "overwrite=true"
        )
    return failures.write(Path(config.output))


if __name__ == "__main__":
    launch(main, Config)
