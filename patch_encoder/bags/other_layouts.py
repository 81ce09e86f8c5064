"""Feature bags in the layouts of STAMP, TRIDENT and AnnData.

STAMP: `<slide>.h5` with `feats` (N, D) and `coords` (N, 2) float32 in um, attributes of the file.
TRIDENT: `features_<encoder>/<slide>.h5` with `features` (N, D) and `coords` (N, 2) in level-0 px,
attributes of each. AnnData: `<slide>.h5ad` (`anndata_file.py`). What these cannot say of our tiles
stands beside it as one JSON attribute, so that a bag of STAMP or TRIDENT comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.bags.anndata_file import read_scores, write_anndata
from patch_encoder.bags.bag import Bag
from patch_encoder.tiles.coordinates import FULL_GEOMETRY
from patch_encoder.tiles.formats import trident_attributes
from wsi_common.errors import UserError
from wsi_common.files import sha256_file
from wsi_common.hdf5 import open_hdf5, write_hdf5

# attributes of a file: the content that it was written from
DIGEST, SCORES = "bag_sha256", "scores_sha256"


@dataclass(frozen=True)
class Conversion:
    """A bag that is about to be written in another layout.

    Attributes:
        slide_id: the slide.
        bag: its features, with coordinates.
        mpp: um per level-0 px.
        encoder: name.
        folder: where the file goes in the end.
        scores: table of scores of its tiles; None: there are none.
    """

    slide_id: str
    bag: Bag
    mpp: float
    encoder: str
    folder: Path
    scores: Path | None = None

    def origin(self) -> dict[str, Any]:
        """What decides the content of the file."""
        geometry = replace(self.bag.coordinates().geometry, mpp=self.mpp)
        scores = sha256_file(self.scores) if self.scores and self.scores.is_file() else ""
        return {DIGEST: self.bag.digest(), FULL_GEOMETRY: asdict(geometry), SCORES: scores}

    def stored_origin(self) -> dict[str, str]:
        """The same as attributes of the file."""
        origin = self.origin()
        return origin | {FULL_GEOMETRY: json.dumps(origin[FULL_GEOMETRY])}


def write_stamp_bag(path: Path, given: Conversion) -> None:
    """Write a bag with its corners in um."""
    bag, mpp, where = given.bag, given.mpp, given.bag.coordinates()
    with write_hdf5(path, track_order=False) as file:
        file.create_dataset("feats", data=bag.read().numpy(), track_times=False)
        corners = (where.coords * mpp).astype(np.float32)
        file.create_dataset("coords", data=corners, track_times=False)
        side = {
            "tile_size_um": where.geometry.patch_size_level0 * mpp,
            "tile_size_px": where.geometry.target_size,
        }
        # no stamp_version: its reader refuses one above its own
        file.attrs.update({"unit": "um", "feat_type": "tile", "extractor": given.encoder, **side})
        file.attrs.update(given.stored_origin() | {"mpp": mpp})


def write_trident_bag(path: Path, given: Conversion) -> None:
    """Write a bag with TRIDENT's attributes."""
    bag, folder, where = given.bag, given.folder, given.bag.coordinates()
    with write_hdf5(path, track_order=False) as file:
        features = file.create_dataset("features", data=bag.read().numpy(), track_times=False)
        place = {"name": where.geometry.name, "savetodir": str(folder), "encoder": given.encoder}
        features.attrs.update(place)
        corners = file.create_dataset("coords", data=where.coords, track_times=False)
        corners.attrs.update(trident_attributes(where.geometry, given.mpp, folder))
        file.attrs.update(given.stored_origin())


def write_anndata_bag(path: Path, given: Conversion) -> None:
    """Write a bag as AnnData, with the scores of its tiles."""
    geometry = replace(given.bag.coordinates().geometry, mpp=given.mpp)
    bag = replace(given.bag, geometry=geometry)
    scores = read_scores(given.scores, bag.coordinates()) if given.scores else {}
    own = (given.slide_id, bag, given.encoder)
    write_anndata(path, *own, scores, given.stored_origin() | {"mpp": given.mpp})


def read_origin(path: Path) -> dict[str, Any]:
    """What a converted bag was written from; {} where the file does not say or cannot be read."""
    try:
        with open_hdf5(path, "a converted bag") as file:
            attributes = dict(file.attrs)
        geometry = json.loads(attributes[FULL_GEOMETRY])
        return {name: attributes[name] for name in (DIGEST, SCORES)} | {FULL_GEOMETRY: geometry}
    except (UserError, KeyError):
        return {}


@dataclass(frozen=True)
class BagFormat:
    """How another tool keeps bags: the function that writes one, and where it lies below the
    output.
    """

    write: Callable[[Path, Conversion], None]
    name: str


BAG_FORMATS = {
    "stamp": BagFormat(write_stamp_bag, "{slide}.h5"),
    "trident": BagFormat(write_trident_bag, "features_{encoder}/{slide}.h5"),
    "anndata": BagFormat(write_anndata_bag, "{slide}.h5ad"),
}
