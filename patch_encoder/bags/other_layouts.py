"""Feature bags in the layouts of STAMP and TRIDENT.

STAMP: `<slide>.h5` with `feats` (N, D) and `coords` (N, 2) float32 in um, attributes of the file.
TRIDENT: `features_<encoder>/<slide>.h5` with `features` (N, D) and `coords` (N, 2) in level-0 px,
attributes of each. What neither can say of our tiles stands beside it as one JSON attribute, so
that the bag comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.bags.bag import Bag
from patch_encoder.tiles.coordinates import FULL_GEOMETRY
from patch_encoder.tiles.formats import trident_attributes
from wsi_common.errors import UserError
from wsi_common.hdf5 import open_hdf5, write_hdf5

DIGEST = "bag_sha256"  # attribute of a file: the content that it was written from


def write_stamp_bag(path: Path, bag: Bag, mpp: float, encoder: str, folder: Path) -> None:
    """Write a bag with its corners in um, for a slide of `mpp` um per level-0 px."""
    where = bag.coordinates()
    with write_hdf5(path, track_order=False) as file:
        file.create_dataset("feats", data=bag.read().numpy(), track_times=False)
        corners = (where.coords * mpp).astype(np.float32)
        file.create_dataset("coords", data=corners, track_times=False)
        side = {
            "tile_size_um": where.geometry.patch_size_level0 * mpp,
            "tile_size_px": where.geometry.target_size,
        }
        # no stamp_version: its reader refuses one above its own
        file.attrs.update({"unit": "um", "feat_type": "tile", "extractor": encoder, **side})
        file.attrs.update(_store_origin(bag, mpp) | {"mpp": mpp})


def write_trident_bag(path: Path, bag: Bag, mpp: float, encoder: str, folder: Path) -> None:
    """Write a bag with TRIDENT's attributes; `folder` is the place that they name."""
    where = bag.coordinates()
    with write_hdf5(path, track_order=False) as file:
        features = file.create_dataset("features", data=bag.read().numpy(), track_times=False)
        place = {"name": where.geometry.name, "savetodir": str(folder), "encoder": encoder}
        features.attrs.update(place)
        corners = file.create_dataset("coords", data=where.coords, track_times=False)
        corners.attrs.update(trident_attributes(where.geometry, mpp, folder))
        file.attrs.update(_store_origin(bag, mpp))


def describe_origin(bag: Bag, mpp: float) -> dict[str, Any]:
    """What decides the content of a converted bag."""
    geometry = replace(bag.coordinates().geometry, mpp=mpp)
    return {DIGEST: bag.digest(), FULL_GEOMETRY: asdict(geometry)}


def _store_origin(bag: Bag, mpp: float) -> dict[str, str]:
    origin = describe_origin(bag, mpp)
    return {DIGEST: origin[DIGEST], FULL_GEOMETRY: json.dumps(origin[FULL_GEOMETRY])}


def read_origin(path: Path) -> dict[str, Any]:
    """What a converted bag was written from; {} where the file does not say or cannot be read."""
    try:
        with open_hdf5(path, "a converted bag") as file:
            attributes = dict(file.attrs)
        return {DIGEST: attributes[DIGEST], FULL_GEOMETRY: json.loads(attributes[FULL_GEOMETRY])}
    except (UserError, KeyError):
        return {}


@dataclass(frozen=True)
class BagFormat:
    """How another tool keeps bags: the function that writes one, and where it lies below the
    output.
    """

    write: Callable[[Path, Bag, float, str, Path], None]
    name: str


BAG_FORMATS = {
    "stamp": BagFormat(write_stamp_bag, "{slide}.h5"),
    "trident": BagFormat(write_trident_bag, "features_{encoder}/{slide}.h5"),
}
