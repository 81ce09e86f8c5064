"""What a trained model's checkpoint says of the bags that it was trained and tested on, and whether
a bag is one of them.

A model gives a number for any features of its width, so that a heatmap of another encoder's
features looks like any other. The checkpoint therefore holds the digest of every bag of its run,
and which encoders made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NoReturn

from patch_encoder.bags.bag import Bag
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

# attributes of a bag that say which features it holds
ENCODER = ("encoder", "weights_sha256", "transform", "stain", "teacher")
TILING = ("target_mpp", "target_size")
SHORT = 8  # digits of a digest in a message


def describe_bags(
    bags: Mapping[str, Bag], digests: Mapping[str, str], cases: Iterable[str]
) -> dict[str, Any]:
    """For a checkpoint: `digests` (slide id -> digest of its bag), `encoders`, the different ones
    that made the bags, `tilings`, the different sizes and resolutions of their tiles, and `cases`,
    digests of the patients' ids, which a model that is handed on does not spell out.
    """
    encoders: list[dict[str, str]] = []
    tilings: list[dict[str, float]] = []
    for bag in bags.values():
        for found, known in ((read_encoder(bag), encoders), (read_tiling(bag), tilings)):
            if found not in known:
                known.append(found)  # type: ignore[arg-type]
    patients = sorted({digest_case(case) for case in cases})
    described = {"digests": dict(digests), "encoders": encoders, "tilings": tilings}
    return described | {"cases": patients}


def digest_case(case_id: str) -> str:
    """By which a patient is recognised."""
    return sha256_bytes(case_id.encode())[:16]


def read_encoder(bag: Bag) -> dict[str, str]:
    """What a bag says of the encoder that made it; empty for a bag that says nothing."""
    return {name: str(bag.provenance[name]) for name in ENCODER if name in bag.provenance}


def read_tiling(bag: Bag) -> dict[str, float]:
    """What a bag says of the size and resolution of its tiles; empty for one that says nothing."""
    stated = {name: bag.attributes.get(name) for name in TILING}
    numbers = {name: value for name, value in stated.items() if isinstance(value, Real)}
    return {name: round(float(value), 3) for name, value in numbers.items()}


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
    record = config["bags"]
    if slide_id not in record["digests"] or bag.shape[1] != config["network"]["dim"]:
        check_encoder(slide_id, bag, config)
        return
    trained, digest = record["digests"][slide_id], bag.digest()
    # a .pt bag, on which CLAM trains, has the features of its .h5 without the coordinates
    if trained == digest or trained == bag.digest_with(None):
        return
    expected = f"the features that the model was tested on ({trained[:SHORT]}"
    expected += f" of {_name(record['encoders'])})"
    found = f"others ({digest[:SHORT]} of {_name([read_encoder(bag)])})"
    _refuse(slide_id, bag, expected, found, REMEDY)


REMEDY = "give features=<folder of the bags that the model was trained on>, or train again on these"


def check_encoder(
    slide_id: str,
    bag: Bag,
    config: Mapping[str, Any],
    remedy: str = REMEDY,
    *,
    unnamed: bool = False,
) -> None:
    """Refuse a bag of another width or another encoder than those that the model was trained on.

    Args:
        slide_id, bag, config: as `check_bag`.
        remedy: what the user can do, for the message.
        unnamed: take a bag that says of no encoder.

    Raises:
        UserError: names both encoders.
    """
    record, own, dim = config["bags"], read_encoder(bag), config["network"]["dim"]
    if bag.shape[1] != dim:
        _refuse(slide_id, bag, f"{dim} features per tile", f"{bag.shape[1]}", remedy)
    if own not in record["encoders"] and not (unnamed and not own):
        expected = f"features of the model's encoder, {_name(record['encoders'])}"
        _refuse(slide_id, bag, expected, f"those of {_name([own])}", remedy)


def _refuse(slide_id: str, bag: Bag, expected: str, found: str, remedy: str) -> NoReturn:
    raise UserError(f"slide {slide_id}: expected {expected}, found {found} in {bag.path}; {remedy}")


def _name(encoders: Iterable[Mapping[str, str]]) -> str:
    """The encoders by name, with the first digits of their weights' digests."""
    names = (
        f"{e.get('encoder', 'an unnamed encoder')} {e.get('weights_sha256', '')[:SHORT]}".strip()
        + (f" with {e['stain']}" if "stain" in e else "")
        for e in encoders
    )
    return " or ".join(names)
