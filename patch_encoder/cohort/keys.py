"""The configuration keys that several scripts over a cohort of slides share."""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.cohort.selection import Selection, read_selection
from wsi_common.config import REQUIRED, key


@dataclass
class ReaderKeys:
    """How slides are found and opened."""

    mpp: float | None = key(
        None, "micrometres per pixel at level 0; of slides that labels.csv does not give"
    )
    tile_pattern: str = key(
        "", "how tile folders name their tiles, as in tile_x{x}_y{y}.png; empty: <row>_<col>"
    )
    pictures: bool = key(
        False,
        "plain pictures (png, jpg, ...) are slides too; labelled ones always are, and all of them "
        "where nothing else is",
    )


@dataclass
class SlidesListKeys:
    """Which slides are taken, by their ids."""

    slides_list: str = key(
        "",
        "take only these slides: a text file with one slide id or file name per line, or a table "
        "with a slide_id column; empty: all",
        path=True,
        runtime=True,
    )


@dataclass
class ShardKeys:
    """Which part of a cohort this process works on."""

    shard: str = key(
        "",
        "i/n: every n-th slide by size, for process i (from 1) of n over one cohort",
        runtime=True,
    )


@dataclass
class SelectionKeys(SlidesListKeys):
    """Which slides of a cohort are taken."""

    suffixes: list[str] = key(
        [], "take only slide files with these endings, as [.svs,.ndpi]; empty: any", runtime=True
    )

    def selection(self) -> Selection:
        """The slides that are taken."""
        return read_selection(self.slides_list, self.suffixes)


@dataclass
class CohortKeys(SelectionKeys):
    """Keys of every pass over the slides of a cohort."""

    slides: str = key(REQUIRED, "slide file, or folder tree of slides", path=True)
    labels: str = key(
        "", "labels.csv of the cohort; only its slides are taken, and mpp comes from it", path=True
    )
    read_timeout: float = key(
        300.0,
        "seconds without progress after which a slide is given up (not with workers=0)",
        runtime=True,
    )


@dataclass
class TileGridKeys(ReaderKeys, CohortKeys):
    """Keys of the scripts that lay a grid of tiles over each slide, one slide per worker."""

    tile_size: int = key(256, "side of a tile, px; at target_mpp")
    target_mpp: float | None = key(
        0.5, "micrometres per pixel of the tiles; null: level 0 as it is"
    )
    overlap: float = key(0.0, "share of its side that a tile has in common with its neighbour")
    workers: int | None = key(
        None,
        "worker processes; one slide each; null: one per core, at most 8; 0: the main process, "
        "which a slide that crashes its reader ends",
        runtime=True,
    )
