"""Whether a bag goes with a slide encoder.

A slide encoder gives a number for any features of its width, so that the tile encoder, and not the
width alone, has to be the one that it was trained on.
"""

from __future__ import annotations

from patch_encoder.bags.bag import Bag
from patch_encoder.models.encoder_table import ALIASES
from patch_encoder.slide_encoders.build import SlideEncoder
from patch_encoder.slide_encoders.places import warn_once
from wsi_common.errors import UserError

MPP_TOLERANCE = 0.1  # share; slides of one magnification differ by less


def name_tile_encoder(bag: Bag) -> str:
    """The tile encoder that a bag names, by our name of it; empty where it names none."""
    found = str(bag.provenance.get("encoder", ""))
    return ALIASES.get(found, found)


def check_bag_encoder(encoder: SlideEncoder, bag: Bag) -> None:
    """Refuse a bag of another tile encoder; warn where the bag does not say which one made it, or
    its tiles are of another size.

    Raises:
        UserError: another tile encoder, or features of another width.
    """
    wanted, found = encoder.tile_encoders, name_tile_encoder(bag)
    if encoder.in_dim not in (None, bag.shape[1]) or (wanted and found and found not in wanted):
        names = " or ".join(wanted) or "the tile encoder of its training"
        remedy = f"encoder={wanted[0]}" if wanted else "that encoder"
        raise UserError(
            f"{bag.path}: expected tile features of {names} (width {encoder.in_dim}), on which "
            f"slide encoder {encoder.name} was trained, found {found or 'an unnamed encoder'} "
            f"(width {bag.shape[1]}); extract the slide with {remedy}"
        )
    if wanted and not found:
        warn_once(
            f"{bag.path.parent}: the bags do not say which encoder made them; slide encoder "
            f"{encoder.name} is right for {' or '.join(wanted)} only"
        )
    _check_tiles(encoder, bag)


def _check_tiles(encoder: SlideEncoder, bag: Bag) -> None:
    row, attributes = encoder.row, bag.attributes
    tile, mpp = float(attributes.get("target_size", 0)), float(attributes.get("target_mpp", 0.0))
    other = row.tile is not None and tile not in (0, row.tile)
    other |= row.mpp is not None and mpp > 0 and abs(mpp / row.mpp - 1) > MPP_TOLERANCE
    if other:
        warn_once(
            f"slide encoder {encoder.name} was trained on tiles of {row.tile} px at {row.mpp} "
            f"um/px, the bags have {tile:g} px at {mpp:g} um/px: its vectors may be of little use"
        )
