"""Finds the slides of a cohort in any tree of folders: all of them, or those of labels.csv.

A name that cannot be used, a second file of one id, a slide of labels.csv that is not there: none
of these stops the cohort. They are returned beside the slides, for the stage's `failures.csv`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from patch_encoder.cohort.labels import SlideRecord, read_labels
from patch_encoder.cohort.selection import Selection
from patch_encoder.slides.names import (
    DICOM_SUFFIX,
    PICTURE_SUFFIXES,
    SLIDE_SUFFIXES,
    slide_id_of,
    strip_suffix,
    suffix_of,
)
from patch_encoder.slides.tile_folder import TilePattern, parse_tile_pattern
from wsi_common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
ALL = Selection()


@dataclass(frozen=True)
class FoundSlides:
    """The slides of a cohort that are there, and what is wrong with the others.

    Attributes:
        slides: slide id -> file, tile folder or DICOM folder.
        problems: slide id, or name, -> why it cannot be used.
        excluded: ids of slides whose files are of a kind that is not taken.
        mpps: slide id -> um per pixel at level 0 where labels.csv says it, else None.
    """

    slides: dict[str, Path]
    problems: dict[str, str] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    mpps: Mapping[str, float | None] = field(default_factory=dict)


def find_slides(
    root: str | Path,
    tile_pattern: str = "",
    pictures: bool = False,
    *,
    wanted: Set[str] = frozenset(),
    selection: Selection = ALL,
) -> FoundSlides:
    """Every slide anywhere below `root`, or `root` itself, sorted by id.

    Args:
        root: any tree; a slide file is a cohort of one.
        tile_pattern: how tile folders name their tiles (patch_encoder.slides.tile_folder).
        pictures: plain pictures (PNG, JPEG, ...) are slides too; they are without being asked for
            where nothing else is.
        wanted: ids that are taken from plain pictures where no other file has them.
        selection: the slides that are taken.

    Raises:
        UserError: no slide there that can be used.
    """
    root, problems = Path(root), dict[str, str]()
    pattern = parse_tile_pattern(tile_pattern)
    found = _find_paths(root, pattern, pictures, selection, problems)
    by_id = _group(found, selection, problems)
    missing = (wanted | selection.names.keys()) - by_id.keys()
    if missing and root.is_dir():
        plain = _group(_walk(root, pattern, PICTURE_SUFFIXES, set(), {}), selection, {})
        by_id |= {slide_id: plain[slide_id] for slide_id in missing & plain.keys()}
    taken = {name: _take(paths, selection) for name, paths in sorted(by_id.items())}
    slides = {name: paths[0] for name, paths in taken.items() if len(paths) == 1}
    problems |= {name: _describe_two(name, paths) for name, paths in taken.items() if paths[1:]}
    cohort = FoundSlides(slides, problems, frozenset(name for name in taken if not taken[name]))
    return _refuse_empty(_add_unlisted(cohort, root, selection), root, tile_pattern)


def find_slides_by_folder(
    root: str | Path,
    tile_pattern: str = "",
    pictures: bool = False,
    *,
    selection: Selection = ALL,
) -> FoundSlides:
    """Every slide anywhere below `root`, named `<folder below root>/<slide id>`: folders are
    cohorts of their own, whose slides may have the same ids. The arguments are those of
    `find_slides`.

    Raises:
        UserError: no slide there that can be used.
    """
    root, problems = Path(root), dict[str, str]()
    slides: dict[str, Path] = {}
    excluded: set[str] = set()
    folders: dict[str, list[Path]] = {}
    pattern = parse_tile_pattern(tile_pattern)
    for path in _find_paths(root, pattern, pictures, selection, problems):
        below = "" if path == root else path.parent.relative_to(root).as_posix()
        folders.setdefault("" if below == "." else f"{below}/", []).append(path)
    for folder, paths in sorted(folders.items()):
        for slide_id, files in sorted(_group(paths, selection, problems).items()):
            taken = _take(files, selection)
            if len(taken) == 1:
                slides[folder + slide_id] = taken[0]
            elif taken:
                problems[folder + slide_id] = _describe_two(slide_id, taken)
            else:
                excluded.add(folder + slide_id)
    cohort = FoundSlides(slides, problems, frozenset(excluded))
    return _refuse_empty(cohort, root, tile_pattern)


def _find_paths(
    root: Path, pattern: TilePattern, pictures: bool, selection: Selection, problems: dict[str, str]
) -> list[Path]:
    """The slide files and folders of a tree, or `root` itself; pictures where nothing else is."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"slides={root}: expected a folder of slides, found none")
    asked = PICTURE_SUFFIXES if pictures else PICTURE_SUFFIXES & selection.suffixes
    found = _walk(root, pattern, SLIDE_SUFFIXES | asked, set(), problems)
    return found or _walk(root, pattern, PICTURE_SUFFIXES, set(), problems)


def _group(
    paths: Iterable[Path], selection: Selection, problems: dict[str, str]
) -> dict[str, list[Path]]:
    """The files of each id that is taken; names that are no ids are entered in `problems`."""
    by_id: dict[str, list[Path]] = {}
    for path in paths:
        try:
            by_id.setdefault(slide_id_of(path), []).append(path)
        except UserError as error:
            if not selection.names:
                problems[ascii(strip_suffix(path.name))[1:-1]] = str(error)
    return {
        slide_id: selection.choose(files, slide_id)
        for slide_id, files in by_id.items()
        if selection.takes_id(slide_id)
    }


def _take(paths: Sequence[Path], selection: Selection) -> list[Path]:
    return [path for path in paths if selection.takes_file(path)]


def _describe_two(slide_id: str, paths: Sequence[Path]) -> str:
    return (
        f"slide id '{slide_id}': expected one slide, found {paths[0]} and {paths[1]}; rename one, "
        "or choose by suffixes= or slides_list="
    )


def _add_unlisted(cohort: FoundSlides, root: Path, selection: Selection) -> FoundSlides:
    """Enter the slides of the list that were not found."""
    known = cohort.slides.keys() | cohort.problems.keys() | cohort.excluded
    problems = {
        name: f"in slides_list, but not below {root}; {did_you_mean(name, cohort.slides)}"
        for name in selection.names
        if name not in known
    }
    return FoundSlides(cohort.slides, cohort.problems | problems, cohort.excluded)


def _refuse_empty(cohort: FoundSlides, root: Path, tile_pattern: str) -> FoundSlides:
    if cohort.slides:
        return cohort
    if cohort.problems:
        first = next(iter(cohort.problems.values()))
        raise UserError(f"slides={root}: expected slides, found none that can be used; {first}")
    raise UserError(
        f"slides={root}: expected slides ({' '.join(sorted(SLIDE_SUFFIXES))}), pictures or "
        f"folders of tiles ({tile_pattern or '<row>_<col>'}), found none"
        + (f"; {len(cohort.excluded)} have another ending" if cohort.excluded else "")
    )


def _walk(
    folder: Path,
    pattern: TilePattern,
    suffixes: Set[str],
    seen: set[Path],
    problems: dict[str, str],
) -> list[Path]:
    """Slides of a folder; one with tiles or one DICOM series in it is a slide itself.

    A picture that is named like a tile makes no tile folder of one that holds slides.
    """
    resolved = folder.resolve()
    if resolved in seen:  # a link that leads back up
        return []
    seen.add(resolved)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    tiles = [entry for entry in entries if pattern.place(entry.name) is not None]
    files = [entry for entry in entries if entry.is_file() and suffix_of(entry) in suffixes]
    if tiles:
        files = [file for file in files if suffix_of(file) in SLIDE_SUFFIXES]
    dicom = [file for file in files if suffix_of(file) == DICOM_SUFFIX]
    if dicom and len(dicom) == len(files):
        return [folder]
    if len(dicom) > 1:
        problems[ascii(folder.name)[1:-1]] = (
            f"{folder}: expected a folder of its own for each DICOM series, found {len(dicom)} "
            "files beside other slides; move them into folders"
        )
        files = [file for file in files if file not in dicom]
    below = [
        slide
        for entry in entries
        if entry.is_dir()
        for slide in _walk(entry, pattern, suffixes, seen, problems)
    ]
    # a single picture above tile folders is none of their tiles either
    holds_slides = files or any(
        suffix_of(slide) in SLIDE_SUFFIXES or (slide.is_dir() and len(tiles) == 1)
        for slide in below
    )
    if tiles and not holds_slides:
        return [folder]
    if tiles:
        logger.warning(
            "%s: %d pictures named like tiles (%s, ...) lie beside slides: left out",
            *(folder, len(tiles), tiles[0].name),
        )
    return files + below


def locate_slides(
    records: Sequence[SlideRecord],
    root: str | Path,
    tile_pattern: str = "",
    pictures: bool = False,
    *,
    selection: Selection = ALL,
) -> FoundSlides:
    """The slides of these records, in their order; the other arguments are those of `find_slides`.

    A record that is no slide may be a plain picture: its row asks for it.

    Raises:
        UserError: none of the slides is below `root`.
    """
    wanted = [record.slide_id for record in records if selection.takes_id(record.slide_id)]
    found = find_slides(root, tile_pattern, pictures, wanted=set(wanted), selection=selection)
    problems = {name: found.problems[name] for name in wanted if name in found.problems}
    known = found.slides.keys() | problems.keys() | found.excluded
    for name in wanted:
        if name not in known:
            remedy = did_you_mean(name, found.slides)
            problems[name] = f"in labels.csv, but not below {root}; {remedy}"
    problems |= {
        name: "in slides_list, but not in labels.csv"
        for name in sorted(selection.names.keys() - set(wanted))
    }
    slides = {name: found.slides[name] for name in wanted if name in found.slides}
    if not slides:
        name, reason = next(iter(problems.items()), ("", "all have other endings"))
        raise UserError(
            f"slides={root}: expected slides of labels.csv, found none of the {len(records)} "
            f"there; '{name}': {reason}"
        )
    mpps = {record.slide_id: record.mpp for record in records}
    return FoundSlides(slides, problems, found.excluded, mpps)


def find_cohort(
    root: str | Path,
    labels: str = "",
    selection: Selection = ALL,
    tile_pattern: str = "",
    pictures: bool = False,
    wanted: Set[str] = frozenset(),
) -> FoundSlides:
    """The slides of labels.csv with the mpp that it gives them, or without one every slide that is
    found.

    Raises:
        UserError: no slide can be used.
    """
    if labels:
        return locate_slides(read_labels(labels), root, tile_pattern, pictures, selection=selection)
    return find_slides(root, tile_pattern, pictures, wanted=wanted, selection=selection)
