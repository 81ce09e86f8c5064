"""Slides composed from annotated pictures (COCO boxes; lists of names for train, val, test).

A field is cut from its top left corner into whole tiles without overlap, which hold a lesion or
none; what is left at the right and the bottom is not used (a 640 x 480 field gives 5 x 3 tiles of
128 px). The slides of a split have balanced classes, few lesion tiles on a positive slide, and no
tile is used twice. Where the annotations name the original of each picture (the slide or patient
that it was taken from), no original is in two slides either.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json

SPLITS = ("train", "val", "test")
MOST_LESIONS = 4
"""A positive slide has 1 to this many lesion tiles."""
Box = tuple[float, float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """A picture: name, size in px, boxes (category, (x0, y0, x1, y1)) of positive area, and the
    original that it was taken from, where that is known.
    """

    file_name: str
    width: int
    height: int
    boxes: tuple[tuple[str, Box], ...]
    original: str = ""


@dataclass(frozen=True)
class FieldTile:
    """A tile of a field: left and top in px, whether it holds (most of) a lesion, and the field's
    original.
    """

    file_name: str
    x: int
    y: int
    lesion: bool
    original: str = ""


def read_fields(annotations: Path) -> tuple[dict[str, Field], list[str], int]:
    """Read a COCO document.

    Returns:
        fields by file name without ending, category names in the document's order, and the number
        of boxes without area that were left out.

    Raises:
        UserError: no COCO document, or two pictures of one name.
    """
    document = read_json(annotations, "a COCO document")
    try:
        categories = {int(item["id"]): str(item["name"]) for item in document["categories"]}
        boxes, empty = _read_boxes(document, categories)
        fields = [
            Field(
                str(item["file_name"]),
                int(item["width"]),
                int(item["height"]),
                tuple(boxes[item["id"]]),
                str(item.get("original", "")),
            )
            for item in document["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{annotations}: expected a COCO document (images, annotations with bbox, "
            f"categories), found {error!r}"
        ) from None
    by_name = {Path(field.file_name).stem: field for field in fields}
    if len(by_name) < len(fields):
        raise UserError(
            f"{annotations}: expected one picture a name, found {len(fields) - len(by_name)} "
            "names twice"
        )
    return by_name, list(categories.values()), empty


def _read_boxes(
    document: dict[str, Any], categories: dict[int, str]
) -> tuple[dict[int, list[tuple[str, Box]]], int]:
    boxes: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    empty = 0
    for item in document["annotations"]:
        x, y, width, height = (float(value) for value in item["bbox"])
        if width > 0 and height > 0:
            boxes[item["image_id"]].append(
                (categories[item["category_id"]], (x, y, x + width, y + height))
            )
        else:
            empty += 1
    return boxes, empty


def split_fields(fields: dict[str, Field], splits: Path, source: Path) -> dict[str, list[Field]]:
    """The fields that `<splits>/{train,val,test}.txt` name (one name a line, without ending), in
    the order of the lists.

    Raises:
        UserError: no list, a name without annotations or picture, or a name in two lists.
    """
    chosen: dict[str, list[Field]] = {}
    seen: dict[str, str] = {}
    for split in SPLITS:
        path = splits / f"{split}.txt"
        if not path.is_file():
            raise UserError(f"{path}: expected a list of picture names, found no file")
        chosen[split] = []
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        for name in filter(None, map(str.strip, lines)):
            if name not in fields:
                raise UserError(
                    f"{path}: '{name}' has no entry in the annotations; "
                    f"{did_you_mean(name, fields)}"
                )
            if name in seen:
                raise UserError(
                    f"{path}: expected each picture once, found '{name}' in {seen[name]} too; "
                    "take one out"
                )
            if not (source / fields[name].file_name).is_file():
                raise UserError(
                    f"{source}: expected the picture {fields[name].file_name} that {path.name} "
                    "names, found none"
                )
            seen[name] = split
            chosen[split].append(fields[name])
    return chosen


def cut_tiles(field: Field, side: int, lesion: str) -> list[FieldTile]:
    """Tiles of a field, row by row.

    A tile holds a lesion when at least half of the area of one box of the category `lesion` lies in
    it; it is clean when no such box touches it; any other tile is left out, because its label is
    not certain.
    """
    targets = [box for category, box in field.boxes if category == lesion]
    tiles = []
    for y in range(0, field.height - side + 1, side):
        for x in range(0, field.width - side + 1, side):
            shares = [_measure_share(box, x, y, side) for box in targets]
            if any(share >= 0.5 for share in shares) or not any(shares):
                tiles.append(FieldTile(field.file_name, x, y, any(shares), field.original))
    return tiles


def _measure_share(box: Box, x: int, y: int, side: int) -> float:
    x0, y0, x1, y1 = box
    width, height = min(x1, x + side) - max(x0, x), min(y1, y + side) - max(y0, y)
    return max(width, 0) * max(height, 0) / ((x1 - x0) * (y1 - y0))


@dataclass(frozen=True)
class ComposedSlide:
    """A slide and its tiles in reading order."""

    slide_id: str
    split: str
    positive: bool
    tiles: tuple[FieldTile, ...]

    @property
    def label(self) -> str:
        """Its label in labels.csv."""
        return "positive" if self.positive else "negative"


def compose_slides(
    split: str, tiles: list[FieldTile], slides: int, tiles_per_slide: int, seed: tuple[int, ...]
) -> list[ComposedSlide]:
    """Compose the slides of one split from its tiles; half of them, rounded down, are positive.

    Raises:
        UserError: there are too few lesion tiles or clean tiles for that many slides.
    """
    if any(tile.original for tile in tiles):
        return _compose_by_original(split, tiles, slides, tiles_per_slide, seed)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    lesions = _shuffle(rng, [tile for tile in tiles if tile.lesion])
    clean = _shuffle(rng, [tile for tile in tiles if not tile.lesion])
    _check_enough(split, slides, tiles_per_slide, len(lesions), len(clean))
    counts = _draw_lesion_counts(rng, slides // 2, len(lesions), tiles_per_slide) + [0] * (
        slides - slides // 2
    )
    while slides * tiles_per_slide - sum(counts) > len(clean):
        # clean tiles are short by less than the lesion tiles still unused: give one more to the
        # slide with fewest
        place = min(range(slides // 2), key=lambda slide: counts[slide])
        counts[place] += 1
    composed = []
    for number, count in enumerate(_shuffle(rng, counts), 1):
        own = [lesions.pop() for _ in range(count)] + [
            clean.pop() for _ in range(tiles_per_slide - count)
        ]
        composed.append(
            ComposedSlide(f"{split}_{number:04d}", split, count > 0, tuple(_shuffle(rng, own)))
        )
    return composed


def _compose_by_original(
    split: str, tiles: list[FieldTile], slides: int, tiles_per_slide: int, seed: tuple[int, ...]
) -> list[ComposedSlide]:
    """The same without an original in two slides."""
    composed = _deal_originals(split, tiles, slides, tiles_per_slide, seed)
    if composed is None:
        most = next(
            fewer
            for fewer in range(slides - 1, -1, -1)
            if _deal_originals(split, tiles, fewer, tiles_per_slide, seed) is not None
        )
        abnormal = {tile.original for tile in tiles if tile.lesion}
        clean = {tile.original for tile in tiles} - abnormal
        raise UserError(
            f"split {split}: expected tiles for {slides} slides of {tiles_per_slide} without an "
            f"original in two, found {len(abnormal)} originals with lesions and {len(clean)} "
            f"clean ones, enough for {most}; set {split}_slides={most} or lower tiles_per_slide"
        )
    return composed


def _deal_originals(
    split: str, tiles: list[FieldTile], slides: int, tiles_per_slide: int, seed: tuple[int, ...]
) -> list[ComposedSlide] | None:
    """A positive slide takes its lesion tiles from one original; clean originals follow until a
    slide is full, and what is left of an original is not used. None where they run out.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    abnormal = {tile.original for tile in tiles if tile.lesion}
    by_original: dict[str, list[FieldTile]] = defaultdict(list)
    for tile in _shuffle(rng, tiles):
        if tile.lesion or tile.original not in abnormal:
            by_original[tile.original].append(tile)
    order = _shuffle(rng, sorted(by_original))
    lesions = [by_original[name] for name in order if name in abnormal]
    clean = [by_original[name] for name in order if name not in abnormal]
    positives = [number < slides // 2 for number in range(slides)]
    composed = []
    for number, positive in enumerate(_shuffle(rng, positives), 1):
        count = int(rng.integers(1, min(MOST_LESIONS, tiles_per_slide) + 1))
        if positive and not lesions:
            return None
        own = lesions.pop()[:count] if positive else []
        while len(own) < tiles_per_slide:
            if not clean:
                return None
            own = own + clean.pop()[: tiles_per_slide - len(own)]
        composed.append(
            ComposedSlide(f"{split}_{number:04d}", split, positive, tuple(_shuffle(rng, own)))
        )
    return composed


def _shuffle(rng: np.random.Generator, items: list[T]) -> list[T]:
    return [items[int(place)] for place in rng.permutation(len(items))]


def _draw_lesion_counts(
    rng: np.random.Generator, slides: int, lesions: int, tiles_per_slide: int
) -> list[int]:
    """Draw 1 to MOST_LESIONS per positive slide, and lower some when there are too few."""
    counts = [
        int(count) for count in rng.integers(1, min(MOST_LESIONS, tiles_per_slide) + 1, slides)
    ]
    while sum(counts) > lesions:
        larger = [place for place, count in enumerate(counts) if count > 1]
        counts[larger[int(rng.integers(0, len(larger)))]] -= 1
    return counts


def _check_enough(split: str, slides: int, tiles_per_slide: int, lesions: int, clean: int) -> None:
    most = _count_most_slides(tiles_per_slide, lesions, clean)
    if slides > most:
        raise UserError(
            f"split {split}: expected tiles for {slides} slides of {tiles_per_slide}, found "
            f"{lesions} lesion tiles and "
            f"{clean} clean ones, enough for {most}; set {split}_slides={most} or lower "
            "tiles_per_slide"
        )


def _count_most_slides(tiles_per_slide: int, lesions: int, clean: int) -> int:
    most = 0
    while True:
        positives = (most + 1) // 2
        usable = min(lesions, positives * min(MOST_LESIONS, tiles_per_slide))
        if positives > lesions or (most + 1) * tiles_per_slide > clean + usable:
            return most
        most += 1
