"""Write feature bags in the layouts of STAMP and TRIDENT, for their classifiers and slide encoders,
or as AnnData.

    python -m patch_encoder.convert_bags features=runs/features/uni2_h to=stamp output=runs/stamp

    python -m patch_encoder.convert_bags features=runs/features/uni2_h to=anndata output=runs/h5ad
        scores=runs/heatmaps/scores

Writes `<output>/<slide_id>.h5` (STAMP), `<output>/features_<encoder>/<slide_id>.h5` (TRIDENT) or
`<output>/<slide_id>.h5ad` (AnnData, with the scores of the tiles as columns of `obs`).
Bags that are there with the same content are kept, other content is refused; slides that fail are
listed in `failures.csv` and the exit status is 1.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.other_layouts import BAG_FORMATS, Conversion, read_origin
from patch_encoder.bags.paths import find_coordinates, list_bags
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import SelectionKeys
from patch_encoder.cohort.labels import read_labels
from patch_encoder.tiles.formats import CoordinateSource
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "convert_bags"


@dataclass
class Config(SelectionKeys):
    """Keys of the conversion of bags."""

    features: str = key(
        REQUIRED, "folder of feature bags; <features>/<encoder> or its h5_files/", path=True
    )
    output: str = key(REQUIRED, "where the results are written; the converted bags", runtime=True)
    to: str = key(REQUIRED, "layout to write", choices=tuple(BAG_FORMATS))
    coords: str = key(
        "", "folder of coordinates files; for bags that do not say where their tiles lie", path=True
    )
    scores: str = key(
        "",
        "folder of tables <slide>.csv with x, y and scores of the tiles, as scores/ of a heatmap; "
        "with to=anndata",
        path=True,
    )
    labels: str = key("", "labels.csv of the cohort; mpp comes from it", path=True)
    mpp: float | None = key(
        None, "micrometres per pixel at level 0; of slides that labels.csv does not give"
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def convert_bag(config: Config, slide_id: str, file: Path, mpp: float | None) -> bool:
    """Convert one bag; whether something was written.

    Raises:
        UserError: a bag that cannot be read or placed, an unknown resolution, or another bag is
            there.
    """
    bag = open_bag(file, find_coordinates(file, config.coords) if config.coords else None)
    bag.check_finite()
    geometry = bag.coordinates().geometry
    mpp = CoordinateSource(slide_id, None, mpp).need_mpp(file, geometry)
    encoder = str(bag.provenance.get("encoder") or Path(config.features).resolve().name)
    layout = BAG_FORMATS[config.to]
    target = Path(config.output) / layout.name.format(slide=slide_id, encoder=encoder)
    scores = Path(config.scores) / f"{slide_id}.csv" if config.scores else None
    given = Conversion(slide_id, bag, mpp, encoder, target.parent, scores)
    how = {"overwrite": config.overwrite}
    if can_reuse(target, lambda: read_origin(target), given.origin(), "another bag", **how):
        return False
    with atomic_path(target) as temporary:
        layout.write(temporary, given)
    return True


def main(config: Config) -> int:
    selection = config.selection()
    if config.suffixes:
        raise UserError("suffixes: a bag does not say how its slide's file ends; use slides_list=")
    if config.scores and config.to != "anndata":
        raise UserError(f"scores={config.scores}: expected to=anndata, found to={config.to}")
    bags = {
        slide_id: file
        for slide_id, file in list_bags(config.features).items()
        if selection.takes_id(slide_id)
    }
    records = read_labels(config.labels) if config.labels else []
    mpps = {record.slide_id: record.mpp for record in records}
    failures, written = Failures(STAGE), 0
    for slide_id in sorted(selection.names.keys() - bags.keys()):
        failures.add(slide_id, f"in slides_list, but without a bag in {config.features}")
    for slide_id, file in progress(bags.items(), "converting", len(bags), "slides"):
        try:
            written += convert_bag(config, slide_id, file, mpps.get(slide_id) or config.mpp)
        except UserError as error:
            failures.add(slide_id, str(error))
    logger.info("%s: %d slides to %s: %d written", STAGE, len(bags), config.to, written)
    return failures.write(Path(config.output))


if __name__ == "__main__":
    launch(main, Config)
