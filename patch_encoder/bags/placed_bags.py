"""A bag and where its tiles lie: by its own coordinates, or by a file of them where the bag has
none (`.pt`, TS2G-KD's).

The file is `<slide_id>.h5` (TRIDENT: `<slide_id>_patches.h5`) as tile_slides writes it, or a bag
with coordinates, in a folder that is named or in `h5_files/` beside the bag's own folder, where
CLAM and extract_features leave it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from common.errors import UserError
from patch_encoder.bags.bag import StoredBag, open_bag
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, read_coordinates

REMEDY = "add coords=<folder of <slide>.h5 as tile_slides writes them, or of bags with coordinates>"


def coordinates_file(bag_file: Path, folder: str | Path = "") -> Path | None:
    """The coordinates of a bag that has none: in `folder`, else beside the bag; None when there is
    no such file.
    """
    folders = (
        [Path(folder)]
        if folder
        else [bag_file.parent.parent / "h5_files", bag_file.parent / "h5_files"]
    )
    names = (f"{bag_file.stem}.h5", f"{bag_file.stem}_patches.h5")
    return next(
        (
            path
            for place in folders
            for name in names
            if (path := place / name).is_file() and path != bag_file
        ),
        None,
    )


def has_places(bag_file: Path) -> bool:
    """Whether a bag can have coordinates with their tile size; whether an `.h5` has them is seen
    when it is opened.
    """
    return bag_file.suffix != ".pt"


def open_placed(bag_file: Path, coords_file: Path | None = None) -> tuple[StoredBag, Coordinates]:
    """A bag, features left on disk, and its tiles.

    Args:
        bag_file: the bag; its own coordinates win.
        coords_file: coordinates for a bag without.

    Raises:
        UserError: unreadable, no coordinates or tile size in either file, another number of tiles.
    """
    bag = open_bag(bag_file)
    if bag.coords is not None and has_places(bag_file):
        geometry = TileGeometry.from_attributes(bag.attributes, str(bag_file))
        return bag, Coordinates(bag.coords.numpy(), geometry)
    if coords_file is None:
        raise UserError(
            f"{bag_file}: expected coords (N, 2) to place its tiles, found none; {REMEDY}"
        )
    found = read_coordinates(coords_file)
    if len(found.coords) != len(bag):
        raise UserError(
            f"{coords_file}: expected the {len(bag)} tiles of {bag_file}, found "
            f"{len(found.coords)}; give the coordinates that "
            "the bag was extracted from"
        )
    own = bag.coords
    if own is not None and not torch.equal(own, torch.from_numpy(found.coords)):
        raise UserError(
            f"{coords_file}: expected the coords that {bag_file} holds, found others; give those "
            "of its extraction"
        )
    return replace(bag, coords=torch.from_numpy(found.coords)), found
