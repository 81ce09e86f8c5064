"""Cut the tiles of a finished tiling by sharpness, ink, empty glass or stain, without reading a
slide again.

    python -m patch_encoder.filter_tiles tiling=runs/tiles output=runs/tiles_sharp min_blur=80
    max_pen=0.05

Reads `<tiles>/coords/*.h5` of `tile_slides quality=true`, writes `<output>/coords/` and
`<output>/filtering.csv`. The tiles that stay keep their order; cohort_report shows where a
threshold lies among a cohort's tiles.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from patch_encoder.cohort.failures import Failures
from patch_encoder.tiles.coordinates import read_coordinates
from patch_encoder.tissue.quality import MEASURES, Cuts, check_shares, filter_coordinates
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import write_csv
from wsi_common.progress import progress

logger = logging.getLogger(__name__)


@dataclass
class Config(Cuts):
    """Keys of the filter."""

    tiling: str = key(REQUIRED, "folder that tile_slides wrote; with quality=true", path=True)
    output: str = key(
        REQUIRED, "where the results are written; coords/ and filtering.csv", runtime=True
    )


def main(config: Config) -> int:
    source, target = Path(config.tiling) / "coords", Path(config.output) / "coords"
    files = sorted(source.glob("*.h5"))
    if not files:
        raise UserError(f"tiling={config.tiling}: expected coords/*.h5 of tile_slides, found none")
    if not config.limits():
        raise UserError(
            "expected at least one of min_blur, max_pen, max_background, min_saturation, "
            "max_darkness; found none"
        )
    check_shares(config.limits())
    if source.resolve() == target.resolve():
        raise UserError(
            f"output={config.output}: expected another folder than tiles, or the dropped tiles "
            "would be lost"
        )
    failures, rows = Failures("filter_tiles"), []
    for path in progress(files, "filtering", len(files), "slides"):
        try:
            dropped = filter_coordinates(path, target / path.name, config)
            rows.append(
                {
                    "slide": path.stem,
                    "tiles": len(read_coordinates(target / path.name).coords),
                    **dropped,
                }
            )
        except UserError as error:
            failures.add(path.stem, str(error))
    table = [dict.fromkeys(MEASURES, 0) | row for row in rows]
    write_csv(Path(config.output) / "filtering.csv", ["slide", "tiles", *MEASURES], table)
    kept = sum(row["tiles"] for row in table)
    lost = sum(row[name] for row in table for name in MEASURES)
    logger.info("filter_tiles: %d of %d tiles stay", kept, kept + lost)
    return failures.write(Path(config.output))


if __name__ == "__main__":
    launch(main, Config)
