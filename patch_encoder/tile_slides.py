"""Find the tissue of every slide of a cohort and write the coordinates of its tiles.

    python -m patch_encoder.tile_slides slides=cohort/slides output=runs/tiles target_mpp=0.5
    tile_size=256

Writes below `<output>`: `coords/<slide_id>.h5`, `overlays/<slide_id>.jpg` (what was taken for
tissue, which tiles were cut, what was dropped), `thumbnails/`, `tissue/<slide_id>.geojson`
(outlines for QuPath) and `tiling.csv`. Finished slides are skipped; slides that cannot be read are
listed in `failures.csv`. `quality=true` measures every tile, so that `filter_tiles` can cut by
sharpness, ink or background later.
"""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.cohort.slide_files import find_cohort
from patch_encoder.cohort.tiling import tile_cohort
from patch_encoder.cohort.tiling_keys import TilingKeys
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key


@dataclass
class Config(TilingKeys):
    """Keys of the tiling stage."""

    output: str = key(
        REQUIRED, "where the results are written; coords/, overlays/ and tiling.csv", runtime=True
    )


def main(config: Config) -> int:
    settings = config.tiling(config.output)
    cohort = find_cohort(
        config.slides, config.labels, config.selection(), config.tile_pattern, config.pictures
    )
    return tile_cohort(cohort, settings)


if __name__ == "__main__":
    launch(main, Config)
