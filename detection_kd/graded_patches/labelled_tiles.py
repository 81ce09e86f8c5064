"""Graded sets from plain sources: a folder of pictures per grade, or a table.

The formats are those of `patch_encoder.probing.tile_sets`, which the probes read too:

    <folder>/<grade>/**/*.png
    image,label[,group][,split]
    slide_id,x,y,label[,case_id][,split]           patches that are cut from slides
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection_kd.graded_patches.graded_set import (
    UNGRADED,
    GradedPatch,
    GradedSet,
    make_graded_set,
)
from patch_encoder.cohort.slide_files import find_slides
from patch_encoder.probing.tile_sets import LabelledTile, TileSet, read_tile_set
from wsi_common.errors import UserError, did_you_mean


def read_labelled_tiles(
    source: str | Path,
    grades: Sequence[str] = (),
    where: str = "",
    group: str = "",
    slides: str | Path = "",
    mpp: float | None = None,
) -> GradedSet:
    """Read a folder or a table.

    Args:
        source: the folder, or the CSV.
        grades: names from the lowest to the highest; empty: the labels by alphabet.
        where: regular expression; only patches whose name has a match are taken.
        group: regular expression; pictures whose file names have the same match are one case.
        slides: folder of the slides, for a table of places.
        mpp: at which patches are cut from slides, um per px.

    Raises:
        UserError: what `read_tile_set` refuses, a label that is no grade, a grade without a patch,
            places without slides and mpp, pictures with mpp.
    """
    tiles = read_tile_set(source, where, group=group)
    names = tuple(grades) or tiles.classes
    _check_grades(tiles, names)
    return _make_set(tiles, names, slides, mpp)


def read_ungraded_tiles(
    source: str | Path,
    grades: tuple[str, ...],
    group: str = "",
    slides: str | Path = "",
    mpp: float | None = None,
) -> GradedSet:
    """Read patches that nobody has graded; columns `label` and `split` are not looked at.

    Args:
        source: a folder of pictures at any depth, or the CSV.
        grades: of the set that they are added to.
        group, slides, mpp: as for `read_labelled_tiles`.

    Raises:
        UserError: what `read_tile_set` refuses, places without slides and mpp, pictures with mpp.
    """
    return _make_set(read_tile_set(source, group=group, labelled=False), grades, slides, mpp)


def _make_set(
    tiles: TileSet, grades: tuple[str, ...], slides: str | Path, mpp: float | None
) -> GradedSet:
    """The patches of these tiles, at these places or in these pictures."""
    source = tiles.source
    if tiles.pictures:
        if mpp is not None:
            raise UserError(
                f"{source}: mpp={mpp}: expected it for places on slides, found pictures; unset it"
            )
        patches = [
            GradedPatch(path, _number(tile, grades), tile.group, tile.group, split=tile.split)
            for tile, path in zip(tiles.tiles, tiles.pictures, strict=True)
        ]
        return make_graded_set(patches, grades, source)
    if not slides or mpp is None:
        raise UserError(
            f"{source}: it lists places on slides; expected slides= and mpp= to cut them, found "
            f"slides={slides or 'nothing'} and mpp={mpp}"
        )
    return make_graded_set(_place_on_slides(tiles, grades, Path(slides)), grades, source, mpp)


def _number(tile: LabelledTile, grades: tuple[str, ...]) -> int:
    return grades.index(tile.label) if tile.label else UNGRADED


def _check_grades(tiles: TileSet, grades: tuple[str, ...]) -> None:
    unknown = sorted(set(tiles.classes) - set(grades))
    if unknown:
        raise UserError(
            f"{tiles.source}: expected labels among grades={','.join(grades)}, found "
            f"'{unknown[0]}'; {did_you_mean(unknown[0], grades)}"
        )
    absent = [name for name in grades if name not in tiles.classes]
    if absent:
        raise UserError(
            f"{tiles.source}: expected patches of every grade, found none of '{absent[0]}'; leave "
            "it out of grades= or mend the labels"
        )


def _place_on_slides(tiles: TileSet, grades: tuple[str, ...], root: Path) -> list[GradedPatch]:
    named = [(tile, *tile.place) for tile in tiles.tiles if tile.place is not None]
    wanted = frozenset(slide for _, slide, _, _ in named)
    found = find_slides(root, pictures=True, wanted=wanted).slides
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(
            f"{tiles.source}: expected its slides below {root}, found {len(missing)} missing, "
            f"first '{missing[0]}'"
        )
    return [_make_patch(tile, grades, slide, (x, y), found[slide]) for tile, slide, x, y in named]


def _make_patch(
    tile: LabelledTile,
    grades: tuple[str, ...],
    slide: str,
    position: tuple[int, int],
    path: Path,
) -> GradedPatch:
    return GradedPatch(path, _number(tile, grades), slide, tile.group, position, tile.split)
