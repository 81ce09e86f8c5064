"""What a trained model's checkpoint says of the bags that it was trained and tested on, and whether
a bag is one of them.

A model gives a number for any features of its width, so that a heatmap of another encoder's
features looks like any other. The checkpoint therefore holds the digest of every bag of its run,
and which encoders made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from patch_encoder.bags.bag import Bag
from wsi_common.errors import UserError

# attributes of a bag that say which features it holds
ENCODER = ("encoder", "weights_sha256", "transform", "stain")
SHORT = 8  # digits of a digest in a message


def describe_bags(bags: Mapping[str, Bag], digests: Mapping[str, str]) -> dict[str, Any]:
    """For a checkpoint: `digests` (slide id -> digest of its bag) and `encoders`, the different
    ones that made the bags.
    """
    encoders: list[dict[str, str]] = []
    for bag in bags.values():
        found = read_encoder(bag)
        if found not in encoders:
            encoders.append(found)
    return {"digests": dict(digests), "encoders": encoders}


def read_encoder(bag: Bag) -> dict[str, str]:
    """What a bag says of the encoder that made it; empty for a bag that says nothing."""
    return {name: str(bag.provenance[name]) for name in ENCODER if name in bag.provenance}


def check_bag(slide_id: str, bag: Bag, config: Mapping[str, Any]) -> None:
    """Refuse a bag that is not the one that the model was trained or tested on; for a slide that is
    new to the model, a bag of another encoder.

    Args:
        slide_id: the slide.
        bag: the features that are about to be shown to the model.
        config: of the model's checkpoint.

    Raises:
        UserError: names both bags.
    """
    record, own = config["bags"], read_encoder(bag)
    if bag.shape[1] != config["network"]["dim"]:
        expected, found = f"{config['network']['dim']} features per tile", f"{bag.shape[1]}"
    elif slide_id in record["digests"]:
        trained, digest = record["digests"][slide_id], bag.digest()
        # a .pt bag, on which CLAM trains, has the features of its .h5 without the coordinates
        if trained == digest or trained == bag.digest_with(None):
            return
        expected = f"the features that the model was tested on ({trained[:SHORT]}"
        expected += f" of {_name(record['encoders'])})"
        found = f"others ({digest[:SHORT]} of {_name([own])})"
    elif own in record["encoders"]:
        return
    else:
        expected = f"features of the model's encoder, {_name(record['encoders'])}"
        found = f"those of {_name([own])}"
    raise UserError(
        f"slide {slide_id}: expected {expected}, found {found} in {bag.path}; give "
        "features=<folder of the bags that the model was trained on>, or train again on these"
    )


def _name(encoders: Iterable[Mapping[str, str]]) -> str:
    """The encoders by name, with the first digits of their weights' digests."""
    names = (
        f"{e.get('encoder', 'an unnamed encoder')} {e.get('weights_sha256', '')[:SHORT]}".strip()
        + (f" with {e['stain']}" if "stain" in e else "")
        for e in encoders
    )
    return " or ".join(names)
