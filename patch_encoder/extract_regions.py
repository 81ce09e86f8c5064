"""Encode the regions of a cohort with a region encoder: one feature bag per slide, with a row per
region.

    python -m patch_encoder.extract_regions weights=runs/slpd regions=runs/regions/uni2_h
    output=runs/features

Writes `<output>/<name>/h5_files/<slide_id>.h5` with the corners and the size of the regions, which
slide classifiers read as any other bag; pool=mean writes one row per slide. Bags that are there
with the same provenance are kept, others are refused; slides that fail are listed in
`<output>/<name>/failures.csv` and the exit status is 1.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.cohort.disk_space import explain_full_disk
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.keys import DeviceKeys
from patch_encoder.prototypes.region_batches import read_batches
from patch_encoder.prototypes.region_encoder import (
    RegionEncoderDescription,
    open_region_encoder,
)
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_vit import RegionViT
from patch_encoder.regions.bag_places import place_regions
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.opening import open_store
from patch_encoder.regions.store import RegionStore
from patch_encoder.tiles.coordinates import Coordinates
from wsi_common import __version__
from wsi_common.checkpoint import save_tensors
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, given_keys, key
from wsi_common.device import autocast, pick_device, pick_precision
from wsi_common.errors import FullDisk, UserError
from wsi_common.files import check_writable, safe_id, sha256_file
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "extract_regions"
POOLS = ("none", "mean")
HIPT_TILES = 16  # side of HIPT's regions; its weights do not say it
COMPARED = (
    *("encoder", "weights_sha256", "transform", "precision", "dtype", "pool", "standardise"),
    *("tile_encoder", "coordinates", "regions_sha256"),
)


@dataclass
class Config(DeviceKeys, RegionKeys):
    """Keys of the extraction of regions."""

    weights: str = key(
        REQUIRED,
        "weights file or folder; the run directory of pretrain_slpd, a backbone file in it, or "
        "HIPT's vit4k_xs file",
        path=True,
    )
    output: str = key(
        REQUIRED,
        "where the results are written; bags go to <output>/<name>/h5_files",
        runtime=True,
    )
    name: str = key(
        "",
        "name of the feature set in the tables; and of its folder; empty: that of the run or file, "
        "with _mean for pool=mean",
    )
    pool: str = key(
        "none",
        "what is pooled; none: a row per region; mean: one row per slide, the mean of its regions",
        choices=POOLS,
    )
    batch_size: int = key(64, "items per step over all processes; regions", runtime=True, least=1)
    dtype: str = key(
        "float32", "number format of the stored features", choices=("float16", "float32")
    )
    pt: bool = key(False, "also write pt_files/<slide_id>.pt")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass
class Extraction:
    """What all slides of one extraction have in common.

    Attributes:
        folder: `<output>/<name>`.
        provenance: of every bag, without what is of the slide.
    """

    config: Config
    folder: Path
    network: RegionViT
    store: RegionStore
    device: torch.device
    precision: str
    provenance: dict[str, str]


def choose_standardise(config: Config, trained: RegionEncoderDescription | None) -> str:
    """How features are standardised: as in the training, unless the file does not tell.

    Raises:
        UserError: the user asks for another way.
    """
    if trained is None:
        return config.standardise
    if "standardise" in given_keys(config) and config.standardise != trained.standardise:
        raise UserError(
            f"standardise={config.standardise}: expected {trained.standardise}, with which "
            f"{config.weights} was trained; leave it out"
        )
    return trained.standardise


def check_regions(
    config: Config, store: RegionStore, width: int, trained: RegionEncoderDescription | None
) -> None:
    """Refuse regions that the encoder was not made for.

    Raises:
        UserError: features of another width or of another tile encoder.
    """
    if store.width != width:
        raise UserError(
            f"regions={config.regions}: expected tile features of width {width}, for which "
            f"{config.weights} was trained, found {store.width}; build the regions from the bags "
            "of that encoder"
        )
    encoder = trained.encoder if trained else ""
    if encoder and store.regions.encoder and encoder != store.regions.encoder:
        raise UserError(
            f"regions={config.regions}: expected tiles of encoder {encoder}, on which "
            f"{config.weights} was trained, found {store.regions.encoder}; build the regions from "
            "the bags of that encoder"
        )
    side = trained.region_tiles if trained else HIPT_TILES
    if store.region_tiles != side:
        line = "%s was trained on regions of %d x %d tiles, these have %d x %d"
        logger.warning(line, config.weights, side, side, store.region_tiles, store.region_tiles)


def open_extraction(config: Config) -> Extraction:
    """Read encoder and regions, and check that they go together."""
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    network, trained, file = open_region_encoder(config.weights)
    config = replace(config, standardise=choose_standardise(config, trained))
    store = open_store(config)
    check_regions(config, store, network.phi[0].in_features, trained)
    stem = file.stem if trained is None else file.resolve().parent.name
    name = config.name or stem + ("_mean" if config.pool == "mean" else "")
    provenance = {
        "encoder": safe_id(name, "name"),
        "weights_sha256": sha256_file(file),
        "transform": f"regions of {store.region_tiles} x {store.region_tiles} tiles",
        "precision": precision,
        "dtype": config.dtype,
        "pool": config.pool,
        "standardise": store.standardise,
        "tile_encoder": store.regions.encoder,
        "software_version": __version__,
    }
    folder = Path(config.output) / name
    return Extraction(config, folder, network.to(device), store, device, precision, provenance)


@torch.no_grad()
def encode_slide(job: Extraction, slide: int) -> Float[Tensor, "m w"]:
    """The embeddings of a slide's regions, or their mean as one row, float32 on the CPU."""
    numbers = job.store.regions.region_numbers(slide)
    size = job.config.batch_size
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    parts = []
    for batch in read_batches(job.store, batches, job.device):
        with autocast(job.device, job.precision):
            parts.append(job.network(pack_regions(batch.features, batch.valid)).float().cpu())
    rows = torch.cat(parts)
    if not rows.isfinite().all():
        raise UserError(
            f"{job.config.weights}: expected finite embeddings, found NaN or infinity in "
            f"{int((~rows.isfinite().all(1)).sum())} of {len(rows)} regions"
        )
    return rows if job.config.pool == "none" else rows.mean(0, keepdim=True)


def describe_bag(job: Extraction, slide: int) -> tuple[Coordinates, dict[str, str]]:
    """Places and provenance of a slide's bag."""
    places = place_regions(job.store, slide)
    if job.config.pool == "mean":
        places = places.enclosing_square()
    digests = {
        "coordinates": places.digest(),
        "regions_sha256": job.store.regions.digests[slide],
    }
    return places, job.provenance | digests


def is_done(job: Extraction, slide: int) -> bool:
    """Whether the slide's bag is there and holds what would be written.

    Raises:
        UserError: it holds something else.
    """
    name, (_, wanted) = job.store.slides[slide], describe_bag(job, slide)
    path = job.folder / "h5_files" / f"{name}.h5"
    if not can_reuse(
        path,
        lambda: {field: open_bag(path).provenance.get(field) for field in COMPARED},
        {field: wanted[field] for field in COMPARED},
        "features of another provenance",
        overwrite=job.config.overwrite,
    ):
        return False
    return not job.config.pt or (job.folder / "pt_files" / f"{name}.pt").is_file()


def extract_slide(job: Extraction, slide: int) -> None:
    """Write the bag of one slide.

    Raises:
        UserError: regions that cannot be read, or no room on the disk.
    """
    name, (places, provenance) = job.store.slides[slide], describe_bag(job, slide)
    rows = encode_slide(job, slide).numpy().astype(np.dtype(job.config.dtype))
    with explain_full_disk(job.folder):
        if job.config.pt:
            save_tensors(job.folder / "pt_files" / f"{name}.pt", torch.from_numpy(rows))
        # last: where it is, the slide is done
        path = job.folder / "h5_files" / f"{name}.h5"
        write_bag(path, rows, places.coords, asdict(places.geometry), provenance)


def main(config: Config) -> int:
    job = open_extraction(config)
    slides = job.store.slides
    todo = [slide for slide in range(len(slides)) if not is_done(job, slide)]
    counts = (len(slides), len(job.store), len(slides) - len(todo))
    logger.info("%s: %d slides with %d regions, %d slides already done", STAGE, *counts)
    check_writable(job.folder / "h5_files")
    failures = Failures(STAGE)
    for slide in progress(todo, f"{job.folder.name} regions", len(todo), "slides"):
        try:
            extract_slide(job, slide)
        except FullDisk:
            raise
        except UserError as error:
            failures.add(slides[slide], str(error))
    job.store.close()
    return failures.write(job.folder)


if __name__ == "__main__":
    launch(main, Config)
