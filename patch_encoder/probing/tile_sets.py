"""Labelled tiles: a folder of pictures per class, a table of pictures, or a table of places on
slides whose features are stored.

    <folder>/<class>/**/*.png                      pictures, the class is the sub-folder
    image,label[,group][,split]                    pictures, paths from the table's folder
    slide_id,x,y,label[,case_id][,split]           tiles of feature bags, corners as in `coords`

Where no labels are asked for, pictures may lie anywhere below a folder, and a table needs neither
label nor split.

Tiles of one group (a slide, a patient) are never on both sides of a split; a tile of a picture is
a group of its own unless it is said otherwise. Tiles of a slide are of its case, else of the slide.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patch_encoder.cohort.labels import list_class_names, read_rows
from patch_encoder.slides.names import PICTURE_SUFFIXES, TIFF_SUFFIXES
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, sha256_file
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
SUFFIXES = PICTURE_SUFFIXES | TIFF_SUFFIXES
SPLITS = {
    **dict.fromkeys(("train", "training", "val", "valid", "validation", "dev", "tune"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}  # what the column split may hold; the probes choose their settings within the training tiles


@dataclass(frozen=True)
class LabelledTile:
    """One tile.

    Attributes:
        name: path of the picture below the folder (or as the table has it), or `slide_id:x,y`.
        label: its class; empty where none is asked for.
        group: what it must not be separated from.
        split: train, test, or empty: folds are drawn.
        path: of the picture; None: the tile of a bag.
        place: slide id and level-0 corner (x, y) of a bag's tile; None: a picture.
    """

    name: str
    label: str
    group: str
    split: str = ""
    path: Path | None = None
    place: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class TileSet:
    """N labelled tiles of C classes; of two classes, the second is the positive one."""

    source: Path
    tiles: tuple[LabelledTile, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tiles)

    @property
    def targets(self) -> np.ndarray:
        """Class index of each tile, (N,) int64."""
        return np.array([self.classes.index(tile.label) for tile in self.tiles], np.int64)

    @property
    def groups(self) -> np.ndarray:
        """Group of each tile, (N,) text."""
        return np.array([tile.group for tile in self.tiles])

    @property
    def splits(self) -> np.ndarray:
        """`train` or `test` of each tile, (N,) text; empty where folds are drawn."""
        return np.array([tile.split for tile in self.tiles])

    @property
    def pictures(self) -> list[Path]:
        """File of each tile; empty for the tiles of bags."""
        return [tile.path for tile in self.tiles if tile.path is not None]

    def digest(self) -> str:
        """Digest of names, labels, groups, splits and the bytes of the pictures.

        Pictures that are there twice are logged: copies on both sides of a split are a leak.
        """
        files = progress(self.pictures, "read tiles", len(self.pictures), "tiles")
        contents = [sha256_file(path) for path in files] or [""] * len(self)
        if self.pictures:
            self._warn_of_copies(contents)
        lines = (
            repr((tile.name, tile.label, tile.group, tile.split, content))
            for tile, content in zip(self.tiles, contents, strict=True)
        )
        return sha256_bytes(repr(self.classes).encode(), *(line.encode() for line in lines))

    def _warn_of_copies(self, contents: Sequence[str]) -> None:
        labels: dict[str, set[str]] = {}
        for tile, content in zip(self.tiles, contents, strict=True):
            labels.setdefault(content, set()).add(tile.label)
        copies, torn = len(contents) - len(labels), sum(len(found) > 1 for found in labels.values())
        if copies:
            logger.warning(
                "%s: %d of %d pictures are copies of another one, and %d stand under several "
                "labels; copies in different groups may be both trained on and tested on",
                *(self.source, copies, len(contents), torn),
            )


def read_tile_set(
    source: str | Path,
    where: str = "",
    test_where: str = "",
    group: str = "",
    positive: str | None = None,
    labelled: bool = True,
) -> TileSet:
    """Read a folder or a table.

    Args:
        source: the folder, or the CSV.
        where: regular expression; only tiles whose name has a match are taken. Empty: all.
        test_where: regular expression; tiles whose name has a match are the test set, the others
            are trained on. Empty: by the column `split`, else folds are drawn.
        group: regular expression; pictures whose file names have the same match are one group.
        positive: label of the positive class; None: the last one by alphabet.
        labelled: False: tiles without labels and classes.

    Raises:
        UserError: no such place, no tiles, an unreadable table, a picture that is not there, a tile
            that is there twice, fewer than two classes; a line each.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: expected a folder of pictures or a CSV, found nothing there")
    read = _read_folder if path.is_dir() else _read_table
    found = list(read(path, labelled))
    tiles = [tile for tile in found if _compile("where", where).search(tile.name)]
    if not tiles:
        raise UserError(f"where={where}: expected it in the name of a tile, found it in none")
    tiles = _set_groups(tiles, group) if group else tiles
    tiles = _set_splits(tiles, test_where) if test_where else tiles
    twice = [name for name, count in Counter(tile.name for tile in tiles).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: expected each tile once, found {len(twice)} more often, first '{twice[0]}'"
        )
    classes = list_class_names(tiles, positive) if labelled else ()
    return TileSet(path, tuple(tiles), tuple(classes))


def read_picture_set(source: str | Path, where: str = "") -> TileSet:
    """Read a set for something that needs pixels.

    Args:
        source, where: as for `read_tile_set`.

    Raises:
        UserError: it cannot be read, or holds places on slides.
    """
    tiles = read_tile_set(source, where)
    if not tiles.pictures:
        raise UserError(
            f"tile_set={source}: expected pictures, found places on slides; give a folder with one "
            "sub-folder of pictures per class, or a CSV with a column image"
        )
    return tiles


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name}={pattern}: expected a regular expression, found {error}") from None


def _read_folder(root: Path, labelled: bool) -> Iterator[LabelledTile]:
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    found = False
    for folder in folders if labelled else [root]:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                name, found = path.relative_to(root).as_posix(), True
                yield LabelledTile(name, folder.name if labelled else "", name, path=path)
    kinds = ", ".join(sorted(SUFFIXES))
    if not found and not labelled:
        raise UserError(f"{root}: expected pictures ({kinds}) below it, found none")
    if not found:
        loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        raise UserError(
            f"{root}: expected a sub-folder of pictures ({kinds}) per class, found "
            f"{len(folders)} sub-folders without any and {loose} pictures beside them; sort the "
            "pictures into sub-folders, or give a CSV image,label"
        )


def _read_table(path: Path, labelled: bool) -> Iterator[LabelledTile]:
    wanted = ("label",) if labelled else ()
    rows = read_rows(path, wanted)
    read: Callable[..., LabelledTile] = _read_picture if "image" in rows[0][1] else _read_place
    if read is _read_place:
        read_rows(path, ("slide_id", "x", "y", *wanted))  # says which column is missing
    split = labelled and "split" in rows[0][1]
    absent = []
    for line, row in rows:
        if split and not row["split"]:
            continue
        if labelled and not row["label"]:
            raise UserError(f"{path} line {line}: expected a label, found an empty cell")
        tile = read(path, line, row)
        absent += [tile.path] if tile.path and not tile.path.is_file() else []
        yield replace(tile, split=_read_split(path, line, row["split"]) if split else "")
    if absent:
        raise UserError(
            f"{path}: expected the pictures that it names, found {len(absent)} missing, first "
            f"{absent[0]}; paths are taken from the table's folder"
        )


def _read_split(path: Path, line: int, text: str) -> str:
    if text.lower() not in SPLITS:
        raise UserError(
            f"{path} line {line}: expected a split of {', '.join(SPLITS)}, found '{text}'; an "
            "empty cell leaves the tile out"
        )
    return SPLITS[text.lower()]


def _read_picture(path: Path, line: int, row: dict[str, str]) -> LabelledTile:
    name = row["image"]
    if not name:
        raise UserError(f"{path} line {line}: expected an image, found an empty cell")
    group = row.get("group") or name
    return LabelledTile(name, row.get("label", ""), group, path=path.parent / name)


def _read_place(path: Path, line: int, row: dict[str, str]) -> LabelledTile:
    slide = row["slide_id"]
    try:
        place = (slide, int(row["x"]), int(row["y"]))
    except ValueError:
        raise UserError(
            f"{path} line {line}: expected x and y in whole level-0 pixels, found "
            f"'{row['x']}' and '{row['y']}'"
        ) from None
    if not slide:
        raise UserError(f"{path} line {line}: expected a slide_id, found an empty cell")
    name = f"{slide}:{place[1]},{place[2]}"
    return LabelledTile(name, row.get("label", ""), row.get("case_id") or slide, place=place)


def _set_groups(tiles: Sequence[LabelledTile], pattern: str) -> list[LabelledTile]:
    if any(tile.group != tile.name for tile in tiles):
        raise UserError(f"group={pattern}: expected it without a column of groups; give one")
    expression, grouped = _compile("group", pattern), []
    for tile in tiles:
        match = expression.search(Path(tile.name).name)
        if match is None:
            raise UserError(
                f"group={pattern}: expected a match in every file name, found none in {tile.name}"
            )
        grouped.append(replace(tile, group=match[0]))
    return grouped


def _set_splits(tiles: Sequence[LabelledTile], pattern: str) -> list[LabelledTile]:
    if any(tile.split for tile in tiles):
        raise UserError(f"test_where={pattern}: expected it without a column split; give one")
    expression = _compile("test_where", pattern)
    return [
        replace(tile, split="test" if expression.search(tile.name) else "train") for tile in tiles
    ]
