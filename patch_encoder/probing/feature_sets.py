"""Features of labelled tiles by encoder: computed once and stored beside the tables, or looked up
in feature bags.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patch_encoder.bags.bag import Bag, open_bag
from patch_encoder.bags.paths import FOLDERS, find_coordinates, list_bags
from patch_encoder.probing.encoders import CONTROLS, ProbedEncoder
from patch_encoder.probing.tile_sets import TileSet
from wsi_common.checkpoint import load_tensors, save_tensors
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import sha256_bytes
from wsi_common.provenance import as_stored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """One row of the table: an encoder, or networks of it that differ in their random start.

    Attributes:
        label: name in the table.
        control: whether it is there for comparison only.
        digest: of what decides its features besides the tiles: weights, or bags.
        made_from: all that decides the features of each network, the tiles among it.
        read: number of a network -> features (N, D) float32.
        encoder: what built them; None for bags.
    """

    label: str
    control: bool
    digest: str
    made_from: tuple[dict[str, Any], ...]
    read: Callable[[int], np.ndarray]
    encoder: ProbedEncoder | None = None


Encode = Callable[[ProbedEncoder, int], np.ndarray]


def open_encoders(
    chosen: Sequence[ProbedEncoder], folder: Path, beside: Mapping[str, Any], encode: Encode
) -> list[FeatureSet]:
    """A feature set of each encoder that can be built; its features are stored in `folder`.

    A control that needs a package which is not installed is left out, and said. One network at a
    time is in memory.

    Args:
        chosen: encoders and controls.
        folder: where features are stored.
        beside: what else decides the features: digest of the tiles, precision.
        encode: computes the features of an encoder's network, by the seed of its random start.

    Raises:
        UserError: an encoder that is no control cannot be built.
    """
    sets = []
    for probed in chosen:
        try:
            provenance = [probed.build(seed).provenance for seed in probed.seeds]
        except UserError as error:
            if not probed.control:
                raise
            logger.warning("the control %s is left out: %s", probed.label, error)
            continue
        made_from = tuple({**beside, **entry} for entry in provenance)
        read = partial(_read_stored, folder, probed, made_from, encode)
        digest = sha256_bytes(repr(provenance).encode())
        sets.append(FeatureSet(probed.label, probed.control, digest, made_from, read, probed))
    return sets


def _read_stored(
    folder: Path,
    probed: ProbedEncoder,
    made_from: Sequence[Mapping[str, Any]],
    encode: Encode,
    number: int,
) -> np.ndarray:
    make = partial(encode, probed, probed.seeds[number])
    return load_or_make(name_file(folder, probed.label, number), made_from[number], make)


def name_file(folder: Path, *parts: object) -> Path:
    """`folder/<parts>.pt`, without characters that a file name cannot have."""
    name = "-".join(map(str, parts))
    return folder / f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}.pt"


def load_or_make(
    path: Path, made_from: Mapping[str, Any], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """An array from a file that was made from the same, else made and written."""
    wanted = as_stored(made_from)
    if path.is_file():
        try:
            content = load_tensors(path, "a stored array")
            if content["made_from"] == wanted:
                return content["array"].numpy()
        except DamagedFile as error:
            logger.warning("%s; it is made anew", error)
    array = make()
    save_tensors(path, {"array": torch.from_numpy(array), "made_from": wanted})
    return array


def open_bag_sets(
    folders: Sequence[str], coords: str, tiles: TileSet, beside: Mapping[str, Any]
) -> list[FeatureSet]:
    """A feature set of each folder of bags, called like its encoder.

    Raises:
        UserError: pictures instead of places, no bag of a slide, two folders of one name.
    """
    if tiles.pictures:
        raise UserError(
            f"{tiles.source}: expected a CSV slide_id,x,y,label beside features=, found pictures"
        )
    sets = []
    for folder in map(Path, folders):
        label = (folder.parent if folder.name in FOLDERS else folder).name
        bags = open_bags(folder, coords, tiles)
        digests = {slide: bag.digest() for slide, bag in bags.items()}
        digest = sha256_bytes(repr(sorted(digests.items())).encode())
        made_from = {**beside, "bags": digest}
        read = partial(_read_bags, bags, tiles)
        sets.append(FeatureSet(label, label in CONTROLS, digest, (made_from,), read))
    labels = [one.label for one in sets]
    if len(set(labels)) < len(labels):
        raise UserError(f"features: expected folders of different names, found {labels}")
    if not any(one.control for one in sets):
        logger.warning(
            "features: none of %s is among them, so that nothing says what colour alone reaches; "
            "extract their bags, too",
            ", ".join(CONTROLS[:3]),
        )
    return sets


def open_bags(folder: Path, coords: str, tiles: TileSet) -> dict[str, Bag]:
    """Slide id -> bag, for every slide of the set.

    Raises:
        UserError: a slide without a bag, bags of several widths.
    """
    files, slides = list_bags(folder), sorted({tile.place[0] for tile in tiles.tiles if tile.place})
    absent = [slide for slide in slides if slide not in files]
    if absent:
        raise UserError(
            f"{folder}: expected a bag of each slide in {tiles.source}, found {len(absent)} "
            f"missing, first '{absent[0]}'"
        )
    bags = {
        slide: open_bag(files[slide], find_coordinates(files[slide], coords)) for slide in slides
    }
    widths = {bag.shape[1] for bag in bags.values()}
    if len(widths) > 1:
        raise UserError(f"{folder}: expected bags of one width, found {sorted(widths)}")
    return bags


def _read_bags(bags: Mapping[str, Bag], tiles: TileSet, _: int) -> np.ndarray:
    """Features (N, D) float32 of the tiles, looked up by their places.

    Raises:
        UserError: a bag without coordinates or without one of the places, features that are not
            finite.
    """
    wanted: dict[str, list[tuple[int, tuple[int, int]]]] = {slide: [] for slide in bags}
    for index, tile in enumerate(tiles.tiles):
        assert tile.place is not None
        wanted[tile.place[0]].append((index, tile.place[1:]))
    result = np.empty((len(tiles), next(iter(bags.values())).shape[1]), np.float32)
    for slide, bag in bags.items():
        bag.check_finite()
        corners = bag.coordinates().coords.tolist()
        row_of = {tuple(corner): row for row, corner in enumerate(corners)}
        absent = [place for _, place in wanted[slide] if place not in row_of]
        if absent:
            raise UserError(
                f"{tiles.source}: expected places of tiles in {bag.path}, found "
                f"{len(absent)} of {len(wanted[slide])} that are none, first x={absent[0][0]} "
                f"y={absent[0][1]}"
            )
        rows = torch.tensor([row_of[place] for _, place in wanted[slide]])
        result[[index for index, _ in wanted[slide]]] = bag.rows(rows).float().numpy()
    return result
