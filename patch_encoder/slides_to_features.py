"""From slides to features in one command: find tissue, cut tiles of the size that the encoder was
trained on, and encode them.

    python -m patch_encoder.slides_to_features slides=cohort/slides encoder=uni2_h
    output=runs/features

Slides of any format that the readers know, mixed in any tree of folders; labels are not needed.
Writes `<output>/tiles/<size>px_<mpp>um/` as `tile_slides` does and
`<output>/<encoder>/h5_files/<slide_id>.h5` as `extract_features` does, so that each of these two
goes on where this one stopped, and the other way round. Encoders of one tile size share its tiles.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from patch_encoder.cohort.shards import Shard
from patch_encoder.cohort.slide_files import FoundSlides, find_cohort
from patch_encoder.cohort.tiling import tile_cohort
from patch_encoder.cohort.tiling_keys import TilingKeys
from patch_encoder.extraction.keys import FeatureKeys, NamedEncoderKeys
from patch_encoder.extraction.loop import ExtractSettings, extract
from patch_encoder.models.encoders import Encoder
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key

logger = logging.getLogger(__name__)


@dataclass
class Config(NamedEncoderKeys, TilingKeys, FeatureKeys):
    """Keys of tiling and of feature extraction."""

    output: str = key(
        REQUIRED, "where the results are written; tiles/ and <encoder>/h5_files", runtime=True
    )
    tile_size: int | None = key(
        None, "side of a tile, px; null: that of the encoder, or 256 where it has none"
    )
    target_mpp: float | None = key(
        None,
        "micrometres per pixel of the tiles; null: that of the encoder, or 0.5 where it has none",
    )
    workers: int | None = key(
        None,
        "worker processes; one slide each for tiling, then they decode; null: one per core, at "
        "most 8; 0: the main process, which a slide that crashes its reader ends",
        runtime=True,
    )


def main(config: Config) -> int:
    settings = config.settings()  # refuses before any weights are loaded
    encoder = config.load_encoder()
    choose_tiles(config, encoder)
    tiles = Path(config.output) / "tiles" / f"{config.tile_size}px_{config.target_mpp:g}um"
    tiling = config.tiling(tiles)
    whole = find_cohort(
        config.slides, config.labels, config.selection(), config.tile_pattern, config.pictures
    )
    cohort = settings.shard.divide(whole)
    if not cohort.slides:
        logger.info("slides_to_features: shard=%s has no slide", config.shard)
        return 0
    tiling = replace(tiling, shard=settings.shard)
    tiled = tile_cohort(cohort, tiling, listed=sorted(whole.slides))
    settings = take_only(cohort, settings)
    place = (config.slides, str(tiles), config.labels, config.output)
    return max(tiled, extract(encoder, *place, settings))


def choose_tiles(config: Config, encoder: Encoder) -> None:
    """Fill in the tile size and resolution that the user left to the encoder."""
    own = encoder.tile is not None and encoder.mpp is not None
    config.tile_size = config.tile_size or encoder.tile_size
    config.target_mpp = config.target_mpp or encoder.target_mpp
    logger.info(
        "slides_to_features: %s: tiles of %d px at %g um per px%s",
        *(encoder.name, config.tile_size, config.target_mpp),
        "" if own else " (nothing is known of the tiles that it was trained on)",
    )


def take_only(cohort: FoundSlides, settings: ExtractSettings) -> ExtractSettings:
    """The settings for exactly these slides."""
    names = {name: frozenset({path.name}) for name, path in cohort.slides.items()}
    shard = Shard(settings.shard.index, settings.shard.count, divided=True)
    selection = replace(settings.selection, names=names)
    return replace(settings, shard=shard, selection=selection, kernels="auto")


if __name__ == "__main__":
    launch(main, Config)
