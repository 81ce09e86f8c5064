"""The corpus of a pre-training: slides in a tree of sub-datasets, each with its tiles.

INTELLIGENS keeps `DATA_DIRECTORY/SUBDATASET/slide.svs` with its corners in `slide.npy` beside it.
The folder is read as it is; corners may also lie there as `.h5` (ours, CLAM's, TRIDENT's, ...), or
apart in a folder of coordinates. A folder of tiles without corners is taken tile by tile, and a
picture without them as one tile.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patch_encoder.cohort.selection import Selection
from patch_encoder.cohort.slide_files import (
    ALL,
    FoundSlides,
    find_cohort,
    find_slides_by_folder,
)
from patch_encoder.slides import open_slide
from patch_encoder.slides.names import (
    PICTURE_SUFFIXES,
    TIFF_SUFFIXES,
    check_fingerprint,
    slide_id_of,
    suffix_of,
)
from patch_encoder.slides.resolution import REMEDY
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tile_stream.tissue_cover import sort_by_band
from patch_encoder.tiles.coordinates import Coordinates, find_coordinate_files, tile_pattern_of
from patch_encoder.tiles.formats import (
    LAYOUTS,
    CoordinateSource,
    detect_layout,
    make_square_geometry,
)
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.processes.pool import Lost, Raised, run_jobs
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
BESIDE = (".npy", ".h5", "_patches.h5")  # endings of coordinates beside a slide
BESIDE_IT = "beside it (<slide>.npy, <slide>.h5)"
MAYBE_TILES = PICTURE_SUFFIXES | TIFF_SUFFIXES
LARGEST_TILE = 4096  # px; a larger picture may be a whole slide, whose coordinates were forgotten


@dataclass(frozen=True)
class TileSource:
    """A slide of the corpus.

    Attributes:
        slide_id: unique in its sub-dataset.
        path: file or folder.
        subdataset: folder below the root, `/` between its parts; empty: the root itself.
        coordinates: of its tiles, int32, in the order of `sort_by_band`.
        mpp: um per level-0 px where it is known.
    """

    slide_id: str
    path: Path
    subdataset: str
    coordinates: Coordinates
    mpp: float | None

    @property
    def name(self) -> str:
        """Unique in the corpus."""
        return f"{self.subdataset}/{self.slide_id}" if self.subdataset else self.slide_id


def find_sources(
    slides: str | Path,
    problems: dict[str, str],
    *,
    coords: str = "",
    labels: str = "",
    selection: Selection = ALL,
    tile_pattern: str = "",
    pictures: bool = False,
    mpp: float | None = None,
    need_mpp: bool = False,
    workers: int = 0,
    timeout: float = math.inf,
) -> list[TileSource]:
    """The slides of a corpus that have tiles, sorted by name; `problems` gets the others, name ->
    reason.

    Args:
        slides: tree of slides, or one slide.
        problems: is added to.
        coords: folder of coordinates files; empty: they lie beside the slides.
        labels: labels.csv, for its selection of slides and their mpp; or empty.
        selection: the slides that are taken.
        tile_pattern, pictures: as for `find_slides`.
        mpp: um per level-0 px of slides that labels.csv does not give.
        need_mpp: read the resolution of the other slides from their files; those of unknown
            resolution cannot be used.
        workers, timeout: processes that open slides for it, and the seconds that one may take.

    Raises:
        UserError: no slides, none with tiles, none of known resolution where that is needed.
    """
    found, files = _find_files(slides, coords, labels, selection, tile_pattern, pictures)
    problems |= found.problems
    where = f"coords={coords}" if coords else BESIDE_IT
    # where other files have coordinates, those without have lost theirs
    tiled = {path.parent for path in found.slides.values() if files(path)}
    sources = []
    for name, path in progress(found.slides.items(), "tile positions", len(found.slides), "slides"):
        known = found.mpps.get(name) or mpp
        try:
            own = not coords and (path.is_dir() or path.parent not in tiled)
            coordinates = _read_positions(path, files(path), known, tile_pattern, where, own)
        except UserError as error:
            problems[name] = str(error)
            continue
        below = path.parent.relative_to(slides).as_posix() if path != Path(slides) else "."
        subdataset = "" if below == "." else below
        known = known or coordinates.geometry.mpp or None
        sources.append(TileSource(slide_id_of(path), path, subdataset, coordinates, known))
    sources.sort(key=lambda source: source.name)
    if not sources:
        name, reason = next(iter(problems.items()), ("", ""))
        raise UserError(
            f"slides={slides}: expected slides with coordinates, found none of "
            f"{len(found.slides)}; '{name}': {reason}"
        )
    return _fill_mpp(sources, problems, workers, timeout) if need_mpp else sources


def digest_sources(sources: Sequence[TileSource]) -> str:
    """Hex digest of the corpus: names, tiles, resolutions. A run that goes on has the same one."""
    parts = (
        f"{source.name} {source.mpp} {source.coordinates.slide_fingerprint} "
        f"{source.coordinates.digest()}\n"
        for source in sources
    )
    return sha256_bytes(*(part.encode() for part in parts))


def _find_files(
    slides: str | Path, coords: str, labels: str, selection: Selection, pattern: str, pictures: bool
) -> tuple[FoundSlides, Callable[[Path], list[Path]]]:
    """The slides, and for a slide the coordinates files that may be its."""
    if coords:
        tiled = find_coordinate_files(coords) or {
            file.stem: file for file in sorted(Path(coords).glob("[!.]*.npy"))
        }
        if not tiled:
            raise UserError(f"coords={coords}: expected coordinates (*.h5, *.npy), found none")
        pattern = pattern or tile_pattern_of(
            file for file in tiled.values() if file.suffix == ".h5"
        )
        found = find_cohort(slides, labels, selection, pattern, pictures, wanted=tiled.keys())
        return found, lambda path: list(filter(None, [tiled.get(slide_id_of(path))]))
    if labels:
        found = find_cohort(slides, labels, selection, pattern, pictures)
    else:
        found = find_slides_by_folder(slides, pattern, pictures, selection=selection)
    return found, _list_beside


def _list_beside(path: Path) -> list[Path]:
    """The coordinates files beside a slide; INTELLIGENS takes the name up to its last dot."""
    stems = dict.fromkeys((slide_id_of(path), path.stem if path.is_file() else path.name))
    files = (path.with_name(stem + ending) for stem in stems for ending in BESIDE)
    return [file for file in files if file.is_file()]


def _read_positions(
    path: Path, files: Sequence[Path], mpp: float | None, pattern: str, where: str, own: bool
) -> Coordinates:
    """The tiles of a slide; without coordinates, where `own` allows it, those of a tile folder or
    of a picture.

    Raises:
        UserError: none, several files of them, unreadable ones, or those of another slide.
    """
    if len(files) > 1:
        raise UserError(
            f"slide {path}: expected one coordinates file beside it, found {files[0].name} and "
            f"{files[1].name}; remove one"
        )
    source = CoordinateSource(slide_id_of(path), mpp=mpp)
    coordinates = None
    if files:
        coordinates = LAYOUTS[detect_layout(files[0])].read(files[0], source)
        if coordinates.slide_fingerprint:
            check_fingerprint(path, coordinates.slide_fingerprint, "its coordinates")
    elif own and (path.is_dir() or suffix_of(path) in MAYBE_TILES):
        coordinates = _take_own_tiles(path, source, pattern)
    if coordinates is None:
        raise UserError(
            f"slide {path}: expected coordinates {where}, found none; tile the slide, or give "
            "coords=..."
        )
    if not len(coordinates.coords):
        raise UserError(f"slide {path}: expected tiles, found none: no tissue")
    geometry = coordinates.geometry
    if path.is_dir() and not geometry.tile_pattern:
        geometry = replace(geometry, tile_pattern=pattern)
    corners = sort_by_band(coordinates.coords, geometry.patch_size_level0)
    return replace(coordinates, coords=corners, geometry=geometry)


def _take_own_tiles(path: Path, source: CoordinateSource, pattern: str) -> Coordinates | None:
    """Every tile of a tile folder, or the largest square in the middle of a picture; None for a
    folder of DICOM files, and for a file that may be a whole slide.
    """
    with open_slide(path, source.mpp, pattern) as slide:
        if isinstance(slide, TileFolder):
            corners, side = slide.corners(), slide.tile_side
        elif (
            path.is_file()
            and len(slide.downsamples) == 1
            and max(slide.width, slide.height) <= LARGEST_TILE
        ):
            side = min(slide.width, slide.height)
            corner = ((slide.width - side) // 2, (slide.height - side) // 2)
            corners = np.array([corner], np.int32)
        else:
            return None
        geometry = make_square_geometry(replace(source, slide=slide), side, side)
        return Coordinates(corners, geometry)


def _fill_mpp(
    sources: Sequence[TileSource], problems: dict[str, str], workers: int, timeout: float
) -> list[TileSource]:
    """The sources with their resolution; those of unknown one are entered in `problems`.

    Raises:
        UserError: no source is left.
    """
    unknown = [number for number, source in enumerate(sources) if not source.mpp]
    jobs = [(sources[i].path, sources[i].coordinates.geometry.tile_pattern) for i in unknown]
    read = dict[int, float]()
    results = run_jobs(read_mpp, jobs, min(workers, len(jobs)), timeout)
    for number, result in progress(results, "resolutions", len(jobs), "slides"):
        source = sources[unknown[number]]
        if isinstance(result, Raised | Lost):
            problems[source.name] = result.reason
        elif result is None:
            problems[source.name] = (
                f"slide {source.path}: expected its resolution in um per pixel for mpps=..., "
                f"found none; {REMEDY}"
            )
        else:
            read[unknown[number]] = result
    known = [
        replace(source, mpp=source.mpp or read[number])
        for number, source in enumerate(sources)
        if source.mpp or number in read
    ]
    if not known:
        raise UserError(
            f"mpps=...: expected slides of known resolution, found none of {len(sources)}; "
            f"{problems[sources[0].name]}"
        )
    return known


def read_mpp(job: tuple[Path, str]) -> float | None:
    """um per level-0 px as a slide's file says it."""
    with open_slide(job[0], tile_pattern=job[1]) as slide:
        return slide.mpp
