"""The annotations of a demonstration set: MIDOG's own form, a table of cases, and copies with wrong
labels in the training fields, whose truth is known.

Formats: `MIDOG.json` holds boxes (x0, y0, x1, y1) of 50 px around each point, category 1 for a
mitotic figure and 2 for a look-alike (MIDOG 2021, Aubreville et al., Medical Image Analysis 2023).
`MIDOG_noisy.json` labels ordinary places as mitoses, too, at random; `MIDOG_systematic.json` labels
every look-alike as one. `noise.csv` tells which of their points are true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_common.errors import UserError
from wsi_common.files import write_csv, write_json

HALF = 25
"""Half a side of a box, px."""
MITOSIS, LOOK_ALIKE = 1, 2
FAR = 64.0
"""A wrong point is at least this far from every mitosis of its field, px."""
POINT_FILES = (
    "MIDOG.json",
    "MIDOG_noisy.json",
    "MIDOG_systematic.json",
    "cases.csv",
    "noise.csv",
)
"""In the order in which they are written: where the last one is there, all are."""
NO_POINTS = np.zeros((0, 2))


@dataclass(frozen=True)
class PointField:
    """The annotation of one picture.

    Attributes:
        file: name of the picture.
        side: of the picture, px.
        mitoses, look_alikes: (N, 2) positions (x, y), px.
        others: (M, 2) positions at which a wrong point may be put.
    """

    file: str
    case: str
    scanner: str
    split: str
    side: int
    mitoses: np.ndarray
    look_alikes: np.ndarray
    others: np.ndarray = field(repr=False)


def write_point_files(
    root: Path, fields: Sequence[PointField], mpp: float, wrong: int, seed: int, info: str
) -> None:
    """Write all POINT_FILES.

    Args:
        fields: of all splits, in the order of the files.
        mpp: micrometres per pixel of all fields.
        wrong: how many wrong mitoses training fields have in the noisy copy.
        seed: of the wrong points.
        info: what the set is, written into the documents.
    """
    noisy = add_wrong_points(fields, wrong, seed)
    systematic = [relabel_look_alikes(field) for field in fields]
    for name, version in zip(POINT_FILES, (fields, noisy, systematic), strict=False):
        write_json(root / name, make_midog_document(version, info))
    rows = [
        {"file": f.file, "case": f.case, "scanner": f.scanner, "mpp": mpp, "split": f.split}
        | {"annotated": 1}
        for f in fields
    ]
    write_csv(root / "cases.csv", tuple(rows[0]), rows)
    noise = [
        {"annotations": name, "file": changed.file, "x": x, "y": y, "truth": int(index < true)}
        for name, version in zip(POINT_FILES[1:3], (noisy, systematic), strict=True)
        for changed, true in zip(version, (len(f.mitoses) for f in fields), strict=True)
        for index, (x, y) in enumerate(round_points(changed.mitoses).tolist())
        if changed.split == "train"
    ]
    write_csv(root / "noise.csv", ("annotations", "file", "x", "y", "truth"), noise)


def count_wrong(true: int, share: float) -> int:
    """How many wrong ones make up a share of all, beside the true ones."""
    return round(true * share / (1 - share))


def add_wrong_points(fields: Sequence[PointField], count: int, seed: int) -> list[PointField]:
    """The fields with `count` wrong mitoses behind the true ones in training fields, drawn among
    the `others` that lie inside their field and are `FAR` from every mitosis.

    Raises:
        UserError: too few such places.
    """
    places = [
        (number, place)
        for number, f in enumerate(fields)
        if f.split == "train"
        for place in f.others[_is_inside(f.others, f.side) & _is_far(f.others, f.mitoses)]
    ]
    if count > len(places):
        raise UserError(
            f"wrong_share: expected {count} places for wrong mitoses in training fields, found "
            f"{len(places)}; lower it"
        )
    rng = np.random.default_rng((seed, 59))
    drawn: dict[int, list[np.ndarray]] = {}
    for index in rng.permutation(len(places))[:count]:
        number, place = places[index]
        drawn.setdefault(number, []).append(place)
    return [
        replace(f, mitoses=np.concatenate([f.mitoses, np.reshape(drawn.get(number, []), (-1, 2))]))
        for number, f in enumerate(fields)
    ]


def _is_inside(places: np.ndarray, side: int) -> np.ndarray:
    """Nuclei at the border may have their centre beyond it."""
    return ((places >= 0) & (places < side)).all(axis=1)


def _is_far(places: np.ndarray, mitoses: np.ndarray) -> np.ndarray:
    gaps = np.linalg.norm(places[:, None] - mitoses, axis=-1)
    return gaps.min(axis=1, initial=np.inf) >= FAR


def relabel_look_alikes(point_field: PointField) -> PointField:
    """The field with its look-alikes as mitoses behind the true ones, where it is for training."""
    if point_field.split != "train":
        return point_field
    both = np.concatenate([point_field.mitoses, point_field.look_alikes])
    return replace(point_field, mitoses=both, look_alikes=NO_POINTS)


def round_points(points: np.ndarray) -> np.ndarray:
    """The centres (N, 2) that boxes of whole pixels give back."""
    return np.floor(points + 0.5)


def make_midog_document(fields: Sequence[PointField], info: str) -> dict[str, Any]:
    """A MIDOG document; ids count from 1 in the order of the fields."""
    images = [
        {"id": number, "file_name": f.file, "width": f.side, "height": f.side}
        for number, f in enumerate(fields, 1)
    ]
    boxes = [
        (number, category, [int(x) - HALF, int(y) - HALF, int(x) + HALF, int(y) + HALF])
        for number, f in enumerate(fields, 1)
        for category, points in ((MITOSIS, f.mitoses), (LOOK_ALIKE, f.look_alikes))
        for x, y in round_points(points)
    ]
    return {
        "info": {"description": info},
        "categories": [
            {"id": MITOSIS, "name": "mitotic figure"},
            {"id": LOOK_ALIKE, "name": "hard negative"},
        ],
        "images": images,
        "annotations": [
            {"id": index, "image_id": number, "category_id": category, "bbox": box}
            for index, (number, category, box) in enumerate(boxes, 1)
        ],
    }
