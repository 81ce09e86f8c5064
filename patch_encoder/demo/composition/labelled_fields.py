"""Fields of which only a label is known, by their file names: `<kind>_<original> (<number>).jpg`.

The kind is what stands before the first underscore (`NL`, `HSIL`, ...); everything before the
number is the original, the slide or the patient that the field was taken from. Fields of one
original look alike, so that they belong on one side of a split.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from patch_encoder.demo.composition.composed_slides import SPLITS
from wsi_common.errors import UserError

NAME = re.compile(r"(?P<original>(?P<kind>[^_]+)_.*?)[_ ]*\((?P<number>\d+)\).*")
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
MOST_ALIKE = 32
"""Differing bits, of 256, up to which two pictures count as the same one."""


@dataclass(frozen=True)
class LabelledField:
    """A picture: its kind in capital letters, the original that it was taken from, and a file name
    without blanks and brackets.
    """

    path: Path
    kind: str
    original: str
    file_name: str


def find_fields(folder: Path) -> list[LabelledField]:
    """All labelled pictures of a folder tree, sorted by original and path.

    Raises:
        UserError: no pictures, a name without kind and number, or two pictures of one name.
    """
    fields = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            found = NAME.fullmatch(path.stem)
            if found is None:
                raise UserError(
                    f"{path}: expected a name such as 'NL_12_ (3).jpg' (kind, original, number), "
                    "found another one; rename it or take it out"
                )
            original = found["original"].upper()
            name = f"{original}_{found['number']}.png".replace(" ", "_")
            fields.append(LabelledField(path, found["kind"].upper(), original, name))
    if not fields:
        raise UserError(f"fields={folder}: expected pictures, found none")
    name, times = Counter(field.file_name for field in fields).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"fields={folder}: expected each original and number once, found {name} {times} times; "
            "take a folder out"
        )
    return sorted(fields, key=lambda field: (field.original, str(field.path)))


def merge_duplicates(
    fields: Sequence[LabelledField], hashes: Bool[np.ndarray, "n 256"]
) -> tuple[list[LabelledField], int]:
    """Give originals that share a picture, or nearly one, a common name.

    Returns:
        the fields in their order, and how many pairs of pictures of two originals look alike.
    """
    merged = {field.original: field.original for field in fields}
    pairs = 0
    for place, field in enumerate(fields):
        differing = (hashes[place + 1 :] != hashes[place]).sum(axis=1)
        for other in np.flatnonzero(differing <= MOST_ALIKE) + place + 1:
            if fields[other].original != field.original:
                pairs += 1
                old, new = merged[fields[other].original], merged[field.original]
                merged = {name: new if to == old else to for name, to in merged.items()}
    return [replace(field, original=merged[field.original]) for field in fields], pairs


def split_originals(
    fields: Sequence[LabelledField], shares: Mapping[str, float], seed: int
) -> dict[str, list[LabelledField]]:
    """Fields per split; an original is in one split, and each kind gives its share of originals.

    Args:
        shares: share of the originals of `train` and of `val`; the others are `test`. A kind with
            an original or more gives at least one to `train`.
    """
    rng = np.random.default_rng(seed)
    originals: dict[str, list[str]] = defaultdict(list)
    for field in fields:
        if field.original not in originals[field.kind]:
            originals[field.kind].append(field.original)
    split_of: dict[str, str] = {}
    for _, names in sorted(originals.items()):
        mixed = [names[place] for place in rng.permutation(len(names))]
        train = max(1, round(shares["train"] * len(names)))
        val = round(shares["val"] * len(names))
        for place, name in enumerate(mixed):
            # a merged original may have two kinds: the first one decides
            later = "val" if place < train + val else "test"
            split_of.setdefault(name, "train" if place < train else later)
    return {
        split: [field for field in fields if split_of[field.original] == split] for split in SPLITS
    }
