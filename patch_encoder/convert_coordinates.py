"""Convert tile coordinates from and to the layouts of CLAM, TRIDENT, AtlasPatch, STAMP, INTELLIGENS
(`.npy`) and QuPath.

    python -m patch_encoder.convert_coordinates input=clam/patches to=ours output=runs/tiles
    slides=cohort/slides

One file, every one of a folder, or INTELLIGENS's tree, where each `slide.npy` lies beside its slide
in the folder of a sub-dataset. Writes `coords/<slide_id>.h5` (ours), `patches/<slide_id>.h5`
(CLAM, AtlasPatch), `patches/<slide_id>_patches.h5` (TRIDENT) or `<slide_id>.npy|.geojson|.h5` below
`output`. Files that are there with the same content are kept, other content is refused; slides that
fail are listed in `failures.csv` and the exit status is 1.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import ReaderKeys, SelectionKeys
from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.slide_files import FoundSlides, find_slides
from patch_encoder.slides import open_slide
from patch_encoder.slides.base import Slide
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tiles.formats import LAYOUTS, CoordinateSource, describe_content, detect_layout
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, safe_id
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "convert_coordinates"
SUFFIXES = (".h5", ".npy", ".geojson")
FOLDERS = ("coords", "patches", "h5_files", "")


@dataclass
class Config(ReaderKeys, SelectionKeys):
    """Keys of the conversion."""

    input: str = key(
        REQUIRED,
        "a coordinates file, a folder of them (also its coords/, patches/ or h5_files/), or a tree "
        "with <slide>.npy beside the slides",
        path=True,
    )
    output: str = key(REQUIRED, "where the results are written; the converted files", runtime=True)
    to: str = key(REQUIRED, "layout to write", choices=tuple(LAYOUTS))
    source: str = key(
        "auto", "layout of the input; auto: by suffix and attributes", choices=("auto", *LAYOUTS)
    )
    slides: str = key(
        "",
        "slide file, or folder tree of slides; sizes, levels and mpp that the input does not say",
        path=True,
    )
    labels: str = key("", "labels.csv of the cohort; mpp comes from it", path=True)
    tile_size: int = key(256, "side of a tile, px; at level 0, for .npy files, which do not say")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def find_input_files(path: Path, problems: dict[str, str]) -> dict[str, Path]:
    """Slide id -> coordinates file; `problems` gets the slides that several folders of a tree have.

    Raises:
        UserError: none there, or a folder has two of one slide.
    """
    if path.is_file():
        return {file_slide_id(path): path}
    for folder in FOLDERS:
        found: dict[str, Path] = {}
        for file in sorted((path / folder).glob("*")):
            if file.suffix in SUFFIXES and not file.name.startswith("."):
                if (slide_id := file_slide_id(file)) in found:
                    raise UserError(
                        f"slide '{slide_id}': expected one coordinates file, found "
                        f"{found[slide_id]} and {file}"
                    )
                found[slide_id] = file
        if found and folder:
            return found
    for file in sorted(path.glob("*/**/[!.]*.npy")):
        slide_id = file_slide_id(file)
        if slide_id in found:
            problems[slide_id] = (
                f"slide '{slide_id}': expected it in one folder, found {found[slide_id]} and "
                f"{file}; convert each sub-dataset by itself: input={file.parent}"
            )
        found.setdefault(slide_id, file)
    if found:
        return {slide_id: file for slide_id, file in found.items() if slide_id not in problems}
    raise UserError(f"input={path}: expected coordinates files ({', '.join(SUFFIXES)}), found none")


def file_slide_id(path: Path) -> str:
    """The id in a file's name; TRIDENT's ends in `_patches`."""
    return safe_id(path.stem.removesuffix("_patches"))


def check_slide(coordinates: Coordinates, slide: Slide | None, path: Path | None) -> Coordinates:
    """Coordinates that belong to the slide.

    Raises:
        UserError: they were made for another slide or one of another size, or lie outside.
    """
    if slide is None or path is None:
        return coordinates
    check_fingerprint(path, coordinates.slide_fingerprint, "its coordinates")
    geometry, size = coordinates.geometry, (slide.width, slide.height)
    made_for = (geometry.level0_width, geometry.level0_height)
    if made_for not in ((0, 0), size):
        raise UserError(
            f"slide {slide.slide_id}: coordinates are of a slide of {made_for} px, found one of "
            f"{size} px"
        )
    if len(coordinates.coords) and (
        (coordinates.coords < 0).any() or (coordinates.coords >= size).any()
    ):
        raise UserError(
            f"slide {slide.slide_id}: {size[0]}x{size[1]} px, but tiles lie outside; were they "
            "made at level 0?"
        )
    return coordinates


def convert(
    config: Config,
    slide_id: str,
    file: Path,
    slide_path: Path | None,
    mpp: float | None,
    target: Path,
) -> bool:
    """Convert one file; whether something was written.

    Raises:
        UserError: unreadable, beyond what the layout can express, or other content is there.
    """
    layout = LAYOUTS[config.to]
    reader = LAYOUTS[detect_layout(file) if config.source == "auto" else config.source].read
    slide = open_slide(slide_path, mpp, config.tile_pattern) if slide_path else None
    try:
        source = CoordinateSource(slide_id, slide, mpp, config.tile_size)
        coordinates = check_slide(reader(file, source), slide, slide_path)
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder, target.name)
            layout.write(fresh, coordinates, source, Path(config.output))
            wanted = describe_content(fresh)
        if can_reuse(
            target,
            lambda: describe_content(target),
            wanted,
            "other coordinates",
            overwrite=config.overwrite,
        ):
            return False
        with atomic_path(target) as temporary:
            layout.write(temporary, coordinates, source, Path(config.output))
        return True
    finally:
        if slide is not None:
            slide.close()


def main(config: Config) -> int:
    repeated: dict[str, str] = {}
    files = find_input_files(Path(config.input), repeated)
    selection = config.selection()
    if config.suffixes and not config.slides:
        raise UserError("suffixes: expected slides=... to take the files of, found none")
    cohort = (
        find_slides(config.slides, config.tile_pattern, config.pictures, selection=selection)
        if config.slides
        else FoundSlides({})
    )
    files = {
        slide_id: file
        for slide_id, file in files.items()
        if selection.takes_id(slide_id) and slide_id not in cohort.excluded
    }
    mpps = (
        {record.slide_id: record.mpp for record in read_labels(config.labels)}
        if config.labels
        else {}
    )
    failures, written = Failures(STAGE), 0
    failures.add_all({name: line for name, line in repeated.items() if selection.takes_id(name)})
    for slide_id in selection.names.keys() - files.keys() - repeated.keys():
        failures.add(slide_id, f"in slides_list, but not in {config.input}")
    for slide_id, file in progress(files.items(), "converting", len(files), "slides"):
        try:
            if config.slides and slide_id not in cohort.slides:
                absent = f"slide {slide_id}: expected it below {config.slides}, found no such slide"
                raise UserError(cohort.problems.get(slide_id, absent))
            target = Path(config.output) / LAYOUTS[config.to].name.format(slide_id)
            mpp = mpps.get(slide_id) or config.mpp
            written += convert(config, slide_id, file, cohort.slides.get(slide_id), mpp, target)
        except UserError as error:
            failures.add(slide_id, str(error))
    failed = {row["slide"] for row in failures.rows} & files.keys()
    kept = len(files) - written - len(failed)
    logger.info(
        "%s: %d slides to %s: %d written, %d as they were",
        STAGE,
        len(files),
        config.to,
        written,
        kept,
    )
    return failures.write(Path(config.output))


if __name__ == "__main__":
    launch(main, Config)
