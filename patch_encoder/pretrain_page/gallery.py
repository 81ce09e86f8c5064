"""Query tiles with their nearest tiles of other slides, for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from patch_encoder.pretrain_page.neighbours import (
    choose_queries,
    find_neighbours,
    measure_agreement,
    measure_chance,
)
from wsi_common.figures import jpeg_uri

COUNT = 5  # neighbours per query
QUERIES = 6
THUMBNAIL = 112  # px


@dataclass(frozen=True)
class ShownTile:
    """A tile of the gallery: picture, slide, label (or empty), whether its label is the query's."""

    uri: str
    name: str
    label: str
    same: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query and its neighbours, by what they were found."""

    query: ShownTile
    found: dict[str, list[ShownTile]]


@dataclass(frozen=True)
class Gallery:
    """The gallery of one set of tiles.

    Attributes:
        rows: a query each.
        agreement: share of all neighbours that have their tile's label, by what they were found,
            and for neighbours at random; empty without labels.
        tiles: how many were compared.
    """

    rows: list[GalleryRow]
    agreement: dict[str, float]
    tiles: int


def make_gallery(
    pictures: UInt8[np.ndarray, "n s s 3"],
    spaces: Mapping[str, Float[np.ndarray, "n d"]],
    groups: Sequence[str],
    labels: Sequence[str],
    seed: int,
) -> Gallery:
    """Find neighbours in each of the `spaces` among tiles of other groups.

    Args:
        pictures: N tiles.
        spaces: what neighbours are found by -> (N, D) vectors, compared by their distance.
        groups: slide of each tile; neighbours are never of the query's own.
        labels: of each tile; empty texts where it is not known.
        seed: of the choice of queries.
    """
    nearest = {name: find_neighbours(space, groups, COUNT) for name, space in spaces.items()}

    def show(row: int, query: int) -> ShownTile:
        small = cv2.resize(pictures[row], (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        same = bool(labels[row]) and labels[row] == labels[query]
        return ShownTile(jpeg_uri(np.asarray(small)), groups[row], labels[row], same)

    found_any = all(rows.shape[1] for rows in nearest.values())
    queries = choose_queries(groups, QUERIES, seed) if found_any else []
    rows = [
        GalleryRow(
            show(query, query),
            {
                name: [show(row, query) for row in rows[query].tolist()]
                for name, rows in nearest.items()
            },
        )
        for query in queries
    ]
    agreement = {}
    if queries and all(labels) and len(set(labels)) > 1:
        agreement = {name: measure_agreement(rows, labels) for name, rows in nearest.items()}
        agreement["chance"] = measure_chance(groups, labels)
    return Gallery(rows, agreement, len(pictures))
