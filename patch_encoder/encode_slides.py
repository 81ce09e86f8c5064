"""Encode each slide's bag of tile features as one vector, with a published slide encoder, our own
or a plain pool.

    python -m patch_encoder.encode_slides slide_encoder=mean features=runs/features/uni2_h
    output=runs/slide_features
    python -m patch_encoder.encode_slides slide_encoder=titan trust_remote_code=true
    features=runs/features/conch_v1_5 output=runs/slide_features

Writes `<output>/<name>/<slide_id>.h5`, bags of one row that slide classifiers and probes read as
any other. No slide is read. Vectors that are there with the same provenance are kept, others are
refused; slides that fail are listed in `<output>/<name>/failures.csv` and the exit status is 1.
`list_encoders kind=slide` lists the encoders with what they need and their licences.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from patch_encoder.bags.bag import Bag, open_bag
from patch_encoder.bags.paths import find_coordinates, list_bags
from patch_encoder.cohort.disk_space import explain_full_disk
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import ShardKeys, SlidesListKeys
from patch_encoder.cohort.selection import read_selection
from patch_encoder.cohort.shards import Shard
from patch_encoder.slide_encoders.bag_checks import name_tile_encoder
from patch_encoder.slide_encoders.build import SlideEncoder, build_slide_encoder
from patch_encoder.slide_encoders.table import POOLS
from patch_encoder.slide_encoders.vectors import (
    describe_vector,
    encode_bag,
    keep_compared,
    read_compared,
    write_vector,
)
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import PRECISIONS, pick_device, pick_precision
from wsi_common.errors import FullDisk, UserError
from wsi_common.files import check_writable, safe_id
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "encode_slides"


@dataclass
class Config(SlidesListKeys, ShardKeys):
    """Keys of the encoding of slides."""

    slide_encoder: str = key(
        REQUIRED,
        "slide encoder: mean, max, mean_std, slpd, titan, prism, gigapath, chief, madeleine, "
        "feather, feather_uni or feather_uni2_h",
    )
    features: str = key(
        REQUIRED, "folder of feature bags; <features>/<tile encoder> or its h5_files/", path=True
    )
    output: str = key(REQUIRED, "where the results are written; <name>/<slide>.h5", runtime=True)
    weights: str = key(
        "",
        "weights file or folder; of the slide encoder: its published file, a copy of its hub "
        "repository, or a run of pretrain_slpd; empty: from its hub",
    )
    trust_remote_code: bool = key(
        False,
        "run the Python code that the authors of titan and prism publish beside their weights; it "
        "has all your rights, so read it first",
    )
    pool: str = key(
        "published",
        "what is pooled; of gigapath: the class token, or the mean of the tiles",
        choices=("published", "mean"),
    )
    organ: str = key(
        "", "organ of the slides, for chief's anatomy-aware vector; empty: without an organ"
    )
    name: str = key(
        "",
        "name of the feature set in the tables; and of its folder; empty: the slide encoder's, "
        "with the tile encoder's behind it for mean, max and mean_std",
    )
    coords: str = key(
        "", "folder of coordinates files; for bags that do not say where their tiles lie", path=True
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key(
        "auto",
        "number format of the computation; auto: on a GPU what the encoder's authors use, on a CPU "
        "fp32",
        choices=PRECISIONS,
    )
    dtype: str = key(
        "float32", "number format of the stored features", choices=("float16", "float32")
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def choose_precision(precision: str, encoder: SlideEncoder, device: torch.device) -> str:
    """The precision to compute in; plain pools sum in double precision whatever is asked for."""
    if encoder.name in POOLS:
        return "fp32"
    if precision == "auto":
        return encoder.row.precision if device.type == "cuda" else "fp32"
    return pick_precision(precision, device)


def choose_name(config: Config, encoder: SlideEncoder, bag: Bag) -> str:
    """Name of the feature set, as TRIDENT has it for pools: `mean-<tile encoder>`."""
    if config.name:
        return safe_id(config.name, "name")
    if encoder.name not in POOLS:
        return encoder.name
    tiles = name_tile_encoder(bag) or Path(config.features).resolve().name
    return safe_id(f"{encoder.name}-{tiles.replace('/', '_').replace(':', '_')}", "name")


@dataclass
class SlideEncoding:
    """What all slides of one encoding have in common.

    Attributes:
        folder: `<output>/<name>`.
    """

    config: Config
    encoder: SlideEncoder
    folder: Path
    device: torch.device
    precision: str


def encode_slide(job: SlideEncoding, slide_id: str, file: Path) -> bool:
    """Write the vector of one slide; False where it is there already.

    Raises:
        UserError: a bag that cannot be read or does not go with the encoder, other vectors are
            there, or no room on the disk.
    """
    bag = open_bag(file, find_coordinates(file, job.config.coords))
    path = job.folder / f"{slide_id}.h5"
    provenance = describe_vector(job.encoder, bag, job.precision, job.config.dtype)
    if can_reuse(
        path,
        lambda: read_compared(path),
        keep_compared(provenance),
        "a vector of another provenance",
        overwrite=job.config.overwrite,
    ):
        return False
    vector = encode_bag(job.encoder, bag, job.device, job.precision)
    with explain_full_disk(job.folder):
        write_vector(path, vector, bag, provenance)
    return True


def select_bags(config: Config, shard: Shard, failures: Failures) -> dict[str, Path]:
    """The bags of the slides that are taken, by all shards together; listed slides without one are
    failures of the first.
    """
    selection = read_selection(config.slides_list, [])
    found = list_bags(config.features)
    bags = {slide_id: file for slide_id, file in found.items() if selection.takes_id(slide_id)}
    absent = selection.names.keys() - bags.keys() if shard.index == 1 else ()
    for slide_id in sorted(absent):
        failures.add(slide_id, f"in slides_list, but without a bag in {config.features}")
    if not bags:
        raise UserError(f"slides_list: expected slides with bags in {config.features}, found none")
    return bags


def open_encoding(config: Config, first: Path) -> SlideEncoding:
    """Build the encoder and choose the folder, by what the first bag says of its tile encoder."""
    device = pick_device(config.device)
    encoder = build_slide_encoder(
        config.slide_encoder, config.weights, config.pool, config.organ, config.trust_remote_code
    )
    encoder.module.to(device)
    folder = Path(config.output) / choose_name(config, encoder, open_bag(first))
    precision = choose_precision(config.precision, encoder, device)
    return SlideEncoding(config, encoder, folder, device, precision)


def main(config: Config) -> int:
    shard = Shard.parse(config.shard)
    failures = Failures(STAGE, shard.name)
    bags = select_bags(config, shard, failures)
    # by the first bag of all shards, so that they write to one folder
    job = open_encoding(config, next(iter(bags.values())))
    bags = shard.divide_files(bags)
    check_writable(job.folder)
    logger.info("%s: %s, licence: %s", STAGE, job.encoder.name, job.encoder.provenance["licence"])
    written = 0
    for slide_id, file in progress(bags.items(), f"{job.folder.name} vectors", len(bags), "slides"):
        try:
            written += encode_slide(job, slide_id, file)
        except FullDisk:
            raise
        except UserError as error:
            failures.add(slide_id, str(error))
    counts = (len(bags), written, job.folder)
    logger.info("%s: %d slides, %d vectors written to %s", STAGE, *counts)
    return failures.write(job.folder)


if __name__ == "__main__":
    launch(main, Config)
