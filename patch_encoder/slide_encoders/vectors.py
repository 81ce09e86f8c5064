"""From a bag to the file of its slide's vector, `<output>/<name>/<slide_id>.h5`.

The file is a bag of one row (`features` (1, D), `coords` (1, 2): the square around all tiles), so
that everything that reads bags reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.bags.bag import Bag, open_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.slide_encoders.bag_checks import check_bag_encoder, name_tile_encoder
from patch_encoder.slide_encoders.build import SlideEncoder
from patch_encoder.slide_encoders.places import place_slide, place_tiles
from wsi_common import __version__
from wsi_common.device import autocast
from wsi_common.errors import UserError
from wsi_common.memory import is_out_of_memory

# what decides the numbers of a vector; other values of these are other vectors
COMPARED = (
    *("encoder", "weights_sha256", "code_sha256", "pool", "organ", "regions"),
    *("precision", "dtype", "tile_encoder", "bag_sha256"),
)


@torch.inference_mode()
def encode_bag(
    encoder: SlideEncoder, bag: Bag, device: torch.device, precision: str
) -> Float[Tensor, " w"]:
    """The vector of a slide, float32 on the CPU.

    Args:
        encoder: its module on the device.
        bag: features of the tiles, and their places where the encoder uses them.
        device: where to compute.
        precision: fp32, bf16 or fp16.

    Raises:
        UserError: a bag of another tile encoder, without places, or whose vector is not finite; not
            enough memory.
    """
    check_bag_encoder(encoder, bag)
    places = place_tiles(bag) if encoder.row.needs_coords else None
    try:
        features = bag.read().to(device).float()
        with autocast(device, precision):
            vector = encoder.module(features, places).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{bag.path}: expected memory for the {len(bag)} tiles of the slide on {device}, found "
            "too little; encode it with device=cpu, or cut fewer, larger tiles"
        ) from None
    width = encoder.row.width
    if vector.ndim != 1 or (encoder.row.remote_code and len(vector) != width):
        raise UserError(
            f"{bag.path}: expected one vector of width {width} from slide encoder {encoder.name}, "
            f"found shape {tuple(vector.shape)}"
        )
    if not vector.isfinite().all():
        raise UserError(
            f"{bag.path}: expected a finite vector, found NaN or infinity in "
            f"{int((~vector.isfinite()).sum())} of {len(vector)} numbers; check the bag, or set "
            "precision=fp32"
        )
    return vector


def describe_vector(encoder: SlideEncoder, bag: Bag, precision: str, dtype: str) -> dict[str, str]:
    """Provenance of a slide's vector."""
    tiles, found = name_tile_encoder(bag) or "unnamed", bag.provenance
    own = {
        "transform": f"{encoder.name} over the tiles of {tiles}",
        "precision": precision,
        "dtype": dtype,
        "tile_encoder": tiles,
        "tile_weights_sha256": str(found.get("weights_sha256", "unknown")),
        "bag_sha256": bag.digest(),
        "tiles": str(len(bag)),
        "software_version": __version__,
    }
    return encoder.provenance | own


def read_compared(path: Path) -> dict[str, object]:
    """What a vector's file says of what decides its numbers."""
    return keep_compared(open_bag(path).provenance)


def keep_compared(provenance: Mapping[str, object]) -> dict[str, object]:
    """The part of a provenance by which a vector is reused or refused."""
    return {name: provenance.get(name) for name in COMPARED}


def write_vector(
    path: Path, vector: Float[Tensor, " w"], bag: Bag, provenance: Mapping[str, str]
) -> None:
    """Write the vector of a slide atomically."""
    place = place_slide(bag)
    rows = vector[None].numpy().astype(np.dtype(provenance["dtype"]))
    corners = None if place is None else place.coords
    write_bag(path, rows, corners, {} if place is None else asdict(place.geometry), provenance)
