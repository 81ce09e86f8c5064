"""The configuration keys of a corpus of slides and of the tiles that training draws from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from patch_encoder.cohort.keys import CohortKeys, ReaderKeys
from patch_encoder.tile_stream.plan import BALANCES, SHARD, TilePlan
from patch_encoder.tile_stream.sources import TileSource, find_sources
from wsi_common.config import key

logger = logging.getLogger(__name__)


@dataclass
class StreamKeys(ReaderKeys, CohortKeys):
    """Keys of a training that reads its tiles from slides."""

    coords: str = key(
        "",
        "folder of coordinates files; empty: beside each slide, as <slide>.npy or <slide>.h5",
        path=True,
    )
    tile_size: int = key(256, "side of a tile, px; as the training gets it", least=1)
    balance: str = key(
        "tiles",
        "what is equally likely to be drawn; every tile, every slide, or every sub-dataset (folder "
        "of slides) and every tile in it",
        choices=BALANCES,
    )
    mpps: list[float] = key(
        [],
        "micrometres per pixel of the drawn tiles, one is chosen per visit of a slide; slides with "
        "coarser pixels are left out of it; []: as the coordinates say",
    )
    mpp_weights: list[float] = key(
        [], "how often each of mpps is drawn, one number per entry; []: equally often"
    )
    jitter: float = key(
        0.5, "largest random offset from a stored tile along x and y, in sides of the stored tile"
    )
    tissue_share: float = key(
        0.4, "least share of a drawn tile that stored tiles cover; 0: not looked at"
    )
    open_slides: int = key(
        16, "slides that are drawn from at a time; each worker keeps as many of them open"
    )
    tiles_per_visit: int = key(8, "tiles that are drawn from a slide each time it is opened")
    align: bool = key(
        False,
        "move each drawn tile to the tile grid of its slide's file, so that fewer of the file's "
        "tiles are decoded; without effect where the file does not say its grid",
    )
    cache_dir: str = key(
        "",
        "folder of a cache that runs share; decoded tiles, with jitter=0 and align=false; empty: "
        "none",
    )
    workers: int | None = key(
        None,
        "worker processes; they read tiles, per process; null: one per core, at most 8; 0: the "
        "main process, which a slide that crashes its reader ends",
        runtime=True,
    )

    def find(self, problems: dict[str, str], workers: int) -> list[TileSource]:
        """The corpus; `problems` gets the slides that cannot be used, name -> reason."""
        return find_sources(
            self.slides,
            problems,
            coords=self.coords,
            labels=self.labels,
            selection=self.selection(),
            tile_pattern=self.tile_pattern,
            pictures=self.pictures,
            mpp=self.mpp,
            need_mpp=bool(self.mpps),
            workers=workers,
            timeout=self.read_timeout,
        )

    def plan(self, sources: Sequence[TileSource], seed: int) -> TilePlan:
        """The draws of a training; the log says how many slides are too coarse for one of mpps."""
        plan = TilePlan(
            sources,
            seed,
            self.tile_size,
            self.balance,
            tuple(self.mpps),
            tuple(self.mpp_weights),
            self.jitter,
            self.tissue_share,
            self.open_slides,
            self.tiles_per_visit,
            shard=SHARD if self.cache_dir else 0,
        )
        for mpp, count in plan.count_left_out().items():
            if count:
                line = "mpps: %d of %d slides are too coarse for %g um per px and left out of it"
                logger.info(line, count, len(sources), mpp)
        return plan
