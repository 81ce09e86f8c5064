"""MITOS-ATYPIA 2014: two tables per frame, of mitotic figures and of look-alikes.

Source: the MITOS-ATYPIA-14 challenge (ICPR 2014). Slides `A03` (Aperio) and `H03` (Hamamatsu) are
scans of the same patient 03, so that the case is the number. Frames are `frames/x40/A03_00Aa.tiff`,
tables `mitosis/A03_00Aa_mitosis.csv` and `..._not_mitosis.csv` with `x,y,confidence` per line, x
being the column; they may be empty. A frame without tables, as in the challenge's test part, is not
annotated. Tables repeat some points, which count once.
"""

from __future__ import annotations

import re
from pathlib import Path

from detection_kd.mitosis_sets.bare_tables import read_cells
from detection_kd.mitosis_sets.checked_fields import make_field
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS, AnnotatedField
from wsi_common.errors import UserError

FRAME = re.compile(r"([AH])(\d{2})_\d{2}[A-D][a-d]")
SCANNERS = {"A": ("Aperio ScanScope XT", 0.2455), "H": ("Hamamatsu NanoZoomer 2.0-HT", 0.2274)}
ENDINGS = (("_mitosis", MITOSIS), ("_not_mitosis", LOOK_ALIKE))


def read_mitos_atypia14(
    annotations: Path, images: Path | None, first_index: int
) -> list[AnnotatedField]:
    """One field per frame at 40x.

    Args:
        annotations: folder with the tables, at any depth.
        images: folder with the frames, at any depth; without, frames are those that have tables.
        first_index: index of the first row and column.

    Raises:
        UserError: no tables there, a frame of another name, two tables or images of one frame, or a
            table without its frame.
    """
    tables = {
        (frame, label): path
        for ending, label in ENDINGS
        for frame, path in _find_frames(annotations, f"{ending}.csv").items()
    }
    if not tables:
        raise UserError(f"{annotations}: expected tables <frame>_mitosis.csv, found none")
    annotated = {frame for frame, _ in tables}
    pictures = {} if images is None else _find_frames(images, ".tiff", "x40")
    lost = [] if images is None else sorted(annotated - pictures.keys())
    if lost:
        raise UserError(
            f"{images}: expected x40/{lost[0]}.tiff of the table of that name, found none "
            f"({len(lost)} of {len(annotated)} frames)"
        )
    fields = []
    for frame in sorted(pictures.keys() or annotated):
        files = {label: tables.get((frame, label)) for _, label in ENDINGS}
        slide, patient = _split_name(frame, annotations)
        scanner, mpp = SCANNERS[slide]
        fields.append(
            make_field(
                str(annotations),
                frame,
                pictures.get(frame, Path(f"{frame}.tiff")),
                *read_cells(files, first_index, row_first=False),
                case=patient,
                scanner=scanner,
                mpp=mpp,
                annotated=frame in annotated,
                look_alikes=(frame, LOOK_ALIKE) in tables,
            )
        )
    return fields


def _find_frames(folder: Path, ending: str, parent: str = "") -> dict[str, Path]:
    """Frame -> file whose name is the frame's and this ending, in folders of the name `parent`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob(f"*{ending}")):
        frame = path.name.removesuffix(ending)
        if frame.endswith("_not") or (parent and path.parent.name != parent):
            continue
        if frame in found:
            raise UserError(f"{folder}: expected one {path.name}, found {found[frame]} and {path}")
        found[frame] = path
    return found


def _split_name(frame: str, source: Path) -> tuple[str, str]:
    """The letter of the scanner and the number of the patient."""
    match = FRAME.fullmatch(frame)
    if match is None:
        raise UserError(f"{source}: expected frames as A03_00Aa, found '{frame}'")
    return match[1], match[2]
